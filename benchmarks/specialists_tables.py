"""The tables of `benchmarks.specialists`, from what every run keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.tables import table
from moqe.data.protocols import WHOLE
from moqe.evaluate import BASE, intervals
from moqe.evaluate.format import number, signed_interval
from moqe.store import canonical_json

GENERALIST, LABEL, BEST, MIXTURE = "generalist", "domain label", "best single", "router mixture"
GROUP = 64
MATCHED = "matched"  # instead of specialists: a single expert of about the mixture's bytes in storage
TEXT = "text"  # specialists that follow the base and the calibration text
SMALLEST_GAIN = {4: 0.008, 3: 0.02}  # nats that the mixture should win
RESAMPLES = 2000
Outcomes = dict[str, Any]  # what one run keeps


def sections(found: Mapping[str, list[Outcomes]]) -> dict[str, str]:
    """A section for each width and variant, pooled over seeds, by name. found: runs by kind; they get lines more."""
    written = {}
    for name, runs in found.items():
        bits, variant, *rest = name.split("-", 2)
        if variant == MATCHED:
            continue
        alike = TEXT if variant.startswith(TEXT) else "codes"
        more = ("4-matched", "imatrix-q5") if bits == "4" else (f"{int(bits) + 1}-{alike}", GENERALIST)
        _match(runs, found.get(more[0], []), more[1], f"{more[1]}, {int(bits) + 1} bits", of_more_bits=True)
        if variant.startswith(TEXT):
            _match(runs, found.get(f"{bits}-codes", []), GENERALIST, f"{GENERALIST} that follows the base alone")
        if variant != alike:  # the same windows served by specialists for domains that share codes, in no rounds
            for way in (MIXTURE, LABEL):
                _match(runs, found.get(f"{bits}-{alike}", []), way, f"{way}, specialists: {alike}")
        held = rest[0].removeprefix("without-") if rest else ""
        written[name] = section(int(bits), variant, runs, held)
    return written


def conditions(runs: list[Outcomes]) -> str:
    """What the runs were made with, in words. Raises SystemExit where that differs: their seeds are not one sample."""
    stated = {canonical_json(one["conditions"]): one for one in runs}
    if len(stated) > 1:
        seeds = ", ".join(str(one["seed"]) for one in stated.values())
        raise SystemExit(f"seeds {seeds} were run with different options: {' | '.join(stated)}: run them alike")
    (one,) = stated.values()
    found = {key: value for key, value in one["conditions"].items() if value is not None}
    named = {key: ", ".join(value) if isinstance(value, list) else str(value) for key, value in found.items()}
    return "Options: " + "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in sorted(named.items())) + "."


def _match(runs: list[Outcomes], others: list[Outcomes], expert: str, line: str, *, of_more_bits: bool = False) -> None:
    """Add a line for a single expert of other runs, where these had the same test windows."""
    for run in runs:
        for other in others:
            for protocol, mine in run["protocols"].items():
                theirs = other["protocols"][protocol]
                scored_by = {one["conditions"]["runtime"] for one in (run, other)}
                same = (mine["document"], mine["count"]) == (theirs["document"], theirs["count"])
                if same and len(scored_by) == 1:
                    mine["ways"][line] = theirs["ways"][expert]
                    if of_more_bits:
                        run["more bytes"] = other["bytes"]["one"]


def pooled(found: list[Outcomes], protocol: str) -> tuple[dict[str, NDArray[np.float64]], NDArray[Any], Any, Any]:
    """Losses by way, documents, token counts and domains over the seeds."""
    parts = [one["protocols"][protocol] for one in found]
    ways = {
        name: np.concatenate([np.asarray(part["ways"][name]) for part in parts])
        for name in parts[0]["ways"]
        if all(name in part["ways"] for part in parts)
    }
    document = np.concatenate([np.asarray(part["document"]) for part in parts])
    count = np.concatenate([np.asarray(part["count"]) for part in parts])
    return ways, document, count, np.concatenate([np.asarray(part["domain"]) for part in parts])


def section(bits: int, variant: str, found: list[Outcomes], hold_out: str) -> str:
    """The tables of one width and variant, pooled over its seeds."""
    text = [f"### {bits} bits, group {GROUP}, specialists: {variant}" + (f", without {hold_out}" if hold_out else "")]
    text.append(conditions(found))
    if "rounds" in variant and all(_undone(one) for one in found):
        unchanged = "No round was kept: experts, and what they score, are those of the same recipe without rounds."
        return "\n\n".join([*text, unchanged, alternation(found)])
    for protocol in found[0]["protocols"]:
        ways, document, count, domain = pooled(found, protocol)
        text.append(claim(ways, document, count, bits))
        names = [name for name in ways if name != BEST]
        values = np.stack([ways[name] for name in names], axis=1)
        against = {other: values - ways[other][:, None] for other in (BEST, GENERALIST)}
        bounds = {
            other: intervals(document, difference, count, RESAMPLES, 0, differences=True)
            for other, difference in against.items()
        }
        rows = [
            [
                name,
                number(float(values[:, column].sum() / count.sum())),
                *(signed_interval(bounds[other][column]) for other in against),
            ]
            for column, name in enumerate(names)
        ]
        chosen = ", ".join(sorted({one["protocols"][protocol][BEST] for one in found}))
        header = ["line", "nats", f"minus best single ({chosen}) [95 %]", "minus generalist [95 %]"]
        many = f"{len(found)} seed{'s' if len(found) > 1 else ''}"
        text.append(f"**{protocol}**, {len(document)} windows, {many}.\n\n{table(header, rows)}")
        text.append(by_domain(ways, document, count, domain))
    text += [recovered(found, variant), stored(found)]
    if "clusters" in variant:
        text.append(clusters(found))
    if "rounds" in variant:
        text.append(alternation(found))
    more = {"memory": memory, "held-out": held_out, "prompts": prompts}
    text += [made(found) for name, made in more.items() if all(name in one for one in found)]
    return "\n\n".join(text)


def stored(found: list[Outcomes]) -> str:
    """Bytes in storage."""
    one, family = (float(np.mean([each["bytes"][key] for each in found])) for key in ("one", "family"))
    text = f"Generalist and specialists together take {family / one:.3f} times the bytes of one expert"
    if all("more bytes" in each for each in found):
        more = float(np.mean([each["more bytes"] for each in found]))
        text += f", the single expert of more bits {more / one:.3f} times"
    return text + ". Per token one expert's bytes are read."


def clusters(found: list[Outcomes]) -> str:
    """What each cluster's specialist is for: how many calibration windows, and the words that tell them apart."""
    rows = [
        [name, str(one["seed"]), str(facts["own"]["windows"]), ", ".join(f"`{word}`" for word in facts["own"]["words"])]
        for one in found
        for name, facts in one["made"].items()
        if "own" in facts
    ]
    return table(["specialist", "seed", "calibration windows", "telling words"], rows)


def alternation(found: list[Outcomes]) -> str:
    """The family's loss on validation windows after each round, who answers chosen on the other half of a window."""
    rows = []
    for one in found:
        rounds = _rounds(one)
        values = [rounds[0]["before"], *(entry["after"] for entry in rounds)] if rounds else []
        rows.append([str(one["seed"]), " → ".join(number(value) for value in values) or "none"])
    return "Alternation ends with the first round that does not lower this, and that round is undone.\n\n" + table(
        ["seed", "on validation windows, before and after each round"], rows
    )


def _rounds(one: Outcomes) -> list[dict[str, float]]:
    return next((facts["rounds"] for facts in one["made"].values() if "rounds" in facts), [])


def _undone(one: Outcomes) -> bool:
    """Whether already the first round did not lower the loss."""
    rounds = _rounds(one)
    return bool(rounds) and rounds[0]["after"] >= rounds[0]["before"]


def memory(found: list[Outcomes]) -> str:
    """The mixture minus the generalist, by how many bytes the specialists' own scales may take."""
    (protocol, *_) = found[0]["protocols"]
    ways, document, count, _ = pooled(found, protocol)
    rows = []
    for point in range(len(found[0]["memory"])):
        loss = np.concatenate([np.asarray(one["memory"][point]["loss"]) for one in found])
        spent = float(np.mean([one["memory"][point]["memory"] for one in found]))
        difference = (loss - ways[GENERALIST])[:, None]
        (bound,) = intervals(document, difference, count, RESAMPLES, 0, differences=True)
        rows.append([f"{spent:.3f}", signed_interval(bound)])
    header = ["bytes of generalist and specialists, in one expert's", "learned router minus generalist [95 %]"]
    return f"**Memory**, {protocol}: only some blocks have scales of their own.\n\n{table(header, rows)}"


def held_out(found: list[Outcomes]) -> str:
    """What a domain loses that neither the router nor a specialist is for."""
    rows, header = [], ["domain"]
    for domain in found[0]["held-out"]:
        parts = [one["held-out"][domain] for one in found if domain in one["held-out"]]
        count, document = (np.concatenate([np.asarray(part[key]) for part in parts]) for key in ("count", "document"))
        row, header = [domain], ["domain"]
        for name in parts[0]["routers"]:
            routed = [part["routers"][name] for part in parts]
            difference = np.concatenate([np.asarray(one["loss"]) for one in routed])
            (bound,) = intervals(document, difference[:, None], count, RESAMPLES, 0, differences=True)
            share = float(np.mean([one["generalist"] for one in routed]))
            row += [signed_interval(bound), f"{100 * share:.0f} %"]
            header += [f"{name} minus generalist [95 %]", "to the generalist"]
        rows.append(row)
    return (
        "**Unknown to the router**: without the domain's specialist, routers fitted to the others only. "
        f"(Experts' calibration had seen it.)\n\n{table(header, rows)}"
    )


def prompts(found: list[Outcomes]) -> str:
    """What the mixture wins where routers see fewer tokens, and loses on the domain that they do not know."""
    rows = []
    for tokens in sorted(found[0]["prompts"]["known"]["tokens"], key=int, reverse=True):
        cells = [tokens]
        known, *unknown = ([one["prompts"]["known"] for one in found], *_unknown(found))
        bounds = []
        for parts in (known, *unknown):
            count, document = (np.concatenate([np.asarray(one[key]) for one in parts]) for key in ("count", "document"))
            loss = np.concatenate([np.asarray(one["tokens"][tokens]["loss"]) for one in parts])
            (bound,) = intervals(document, loss[:, None], count, RESAMPLES, 0, differences=True)
            bounds.append((bound, float(np.mean([one["tokens"][tokens]["generalist"] for one in parts]))))
        names = ["", *found[0]["prompts"]["unknown"]]
        worst = max(range(1, len(bounds)), key=lambda at: bounds[at][0].value)
        for at in (0, worst):
            bound, share = bounds[at]
            cells += [f"{names[at]} {signed_interval(bound)}".strip(), f"{100 * share:.0f} %"]
        rows.append(cells)
    header = ["tokens seen", "known domains, minus generalist [95 %]", "to the generalist"]
    header += ["worst unknown domain, minus generalist [95 %]", "to the generalist"]
    return (
        f"**Shorter prompts**: the classifier of domains, which was fitted to the most tokens.\n\n{table(header, rows)}"
    )


def _unknown(found: list[Outcomes]) -> list[list[dict[str, Any]]]:
    """What every run says of each domain that routers did not know."""
    return [[one["prompts"]["unknown"][domain] for one in found] for domain in found[0]["prompts"]["unknown"]]


def by_domain(ways: dict[str, NDArray[np.float64]], document: NDArray[Any], count: Any, domain: Any) -> str:
    """Every specialist and the mixture minus the generalist, by domain of the test windows."""
    names = [name for name in ways if name.startswith("for-")] + [MIXTURE]
    found = np.unique(domain)
    rows = []
    for name in names:
        cells = []
        for one in found:
            part = domain == one
            difference = (ways[name] - ways[GENERALIST])[part, None]
            (bound,) = intervals(document[part], difference, count[part], RESAMPLES, 0, differences=True)
            cells.append(signed_interval(bound))
        rows.append([name, *cells])
    return table(["minus generalist [95 %]", *found], rows)


def claim(ways: dict[str, NDArray[np.float64]], document: NDArray[Any], count: Any, bits: int) -> str:
    """Whether the mixture wins, by how much of what was aimed at, and how much of the label's gain it collects."""
    gains = np.stack([ways[BEST] - ways[name] for name in (MIXTURE, LABEL)], axis=1)
    mixture, label = intervals(document, gains, count, RESAMPLES, 0, differences=True)
    wins = mixture.excludes_zero() and mixture.value > 0
    aim = SMALLEST_GAIN.get(bits)
    parts = [
        f"The mixture {'wins' if wins else 'does not win'}: {mixture.value:+.4f} nats against the best single expert"
    ]
    if aim is not None:
        parts.append(f"{'at least' if wins and mixture.value >= aim else 'less than'} the {aim} aimed at")
    if label.value > 0:
        parts.append(
            f"{100 * mixture.value / label.value:.0f} % of what the domain label would gain ({label.value:+.4f})"
        )
    return "; ".join(parts) + "."


def recovered(found: list[Outcomes], variant: str) -> str:
    """How much of gptq's loss against the base distillation alone takes back; of text only what it changes."""
    ways, document, count, _ = pooled(found, WHOLE)
    gap, left = (float((ways[name] - ways[BASE]).sum() / count.sum()) for name in ("gptq", GENERALIST))
    (bound,) = intervals(document, (ways[GENERALIST] - ways["gptq"])[:, None], count, RESAMPLES, 0, differences=True)
    if variant.startswith(TEXT):  # a share of gptq's loss would take adaptation for repair
        return f"The generalist, which follows base and text: {signed_interval(bound)} nats against gptq."
    text = f"Distillation alone: {signed_interval(bound)} nats against gptq"
    return text + (f", {100 * (1 - left / gap):.0f} % of its loss against the base." if gap > 0 else ".")
