"""The steps of advice: sample, codes, training within the time there is, prediction."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from moqe.advice.advice import Advice, Sampled, WidthFacts, advise_sentence
from moqe.advice.bench import Bench
from moqe.advice.budget import (
    FULL,
    FULL_OWN,
    MOST_WINDOWS,
    Clock,
    Schedule,
    affordable_windows,
    described_cuts,
)
from moqe.advice.codes import GROUP_SIZE, RTN, SCALE_BITS, bits_per_weight, check_bits, expert_of
from moqe.advice.page import write_advice
from moqe.advice.prediction import Predictor, Size, doublings, growth_of
from moqe.advice.samples import (
    AdviceSamples,
    clustered,
    parse_source,
    read_samples,
    routed_labels,
    router_tokens,
    thinned,
)
from moqe.errors import DataError, RecipeError
from moqe.evaluate.significance import MINIMUM_DOCUMENTS
from moqe.methods import check
from moqe.models.decoder import Decoder
from moqe.models.device import check_device
from moqe.models.estimate import expert_block_bytes, measure_shape
from moqe.progress import Progress, Silent
from moqe.recipe import OWN_WEIGHT, Source

REFERENCE_BITS = 8  # always measured: where one model of more bits ends up
_PROBE_WINDOWS = 4
_LATE = 0.1  # of the time, that nobody is told about


def advise(
    base: str,
    data: Sequence[str | Source],
    *,
    bits: Sequence[int] = (2, 3, 4, 8),
    experts: Sequence[int] = (2, 4, 6),
    minutes: float = 10.0,
    out: Path | str | None = None,
    window: int = 256,
    steps: int | None = None,
    text_weight: float = 0.0,
    own_weight: float = OWN_WEIGHT,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Advice:
    """Predict what a mixture of specialists that share codes would gain over one expert, at every width asked for.

    base: as in a recipe. data: texts, `path` or `path=domain`, or a recipe's sources; with one domain windows are told
    apart by cluster. bits: of the codes. experts: sizes of mixtures, the generalist counted. minutes: bound the work;
    what is cut is said in the result. out: a folder for advice.json and advice.png. window: tokens of a sample. steps:
    of distillation, instead of as many as fit; with it, equal seeds give equal advice, unless time cuts windows or the
    search for codes, which the result says. text_weight: as in a recipe's `distill`, the share of the text in what
    experts follow; above 0, gains are of loss and not of divergence. own_weight: as in a recipe's `specialists`,
    how much oftener a specialist sees its own windows.
    Raises RecipeError on options that cannot be, DataError where there are too few documents, ModelError as a build.
    """
    clock, shown = Clock(60.0 * minutes), progress or Silent()
    wanted, sizes = check_bits(bits), _checked(experts, minutes, window, steps, data)
    if not 0.0 <= text_weight < 1.0:
        raise RecipeError(f"text_weight must be at least 0 and below 1, not {text_weight:g}")
    if own_weight <= 1.0:
        raise RecipeError(f"own_weight must be above 1, not {own_weight:g}")
    check_device(device)
    decoder = Decoder.open(base, device=device)
    samples = read_samples(
        [parse_source(source) for source in data], decoder.tokenizer, window, MOST_WINDOWS, seed, shown
    )
    judging = len(set(samples.judging.document))
    if judging < MINIMUM_DOCUMENTS:
        raise DataError(
            f"{judging} documents to judge on are too few to claim anything, {MINIMUM_DOCUMENTS} are needed: "
            "add documents"
        )
    embedding, by_cluster = decoder.embedding(), len(samples.labels) == 1
    if by_cluster:
        samples = clustered(samples, embedding, max(sizes) - 1, seed)
    there = samples.sizes
    seconds, quantized = _window_seconds(decoder, samples), sorted({*wanted, REFERENCE_BITS})
    taken = affordable_windows(clock.seconds, seconds, len(wanted), there)
    if steps is None and 2 * sum(taken) * seconds > clock.left:
        raise RecipeError(
            f"running the base over {sum(taken)} windows takes {2 * sum(taken) * seconds / 60:.1f} of "
            f"{minutes:g} minutes: raise minutes, or choose a shorter window"
        )
    sample = thinned(samples, taken, seed)
    routed = routed_labels(samples, sample.scored.tokens, embedding)
    clock.lap("read")
    specialists = min(len(samples.labels), max(sizes) - 1)
    with tempfile.TemporaryDirectory(prefix="moqe-advise-") as work:
        bench = Bench(decoder, sample, routed, quantized, text_weight, own_weight, seed, Path(work), clock, shown)
        schedule, widths, left_out = bench.measure(wanted, specialists, steps)
    scored, growth = bench.scored, growth_of(widths)
    bytes_of = _sizes(decoder, quantized)
    predictor = Predictor(widths, scored, bytes_of, growth, doublings(schedule.own_steps, FULL_OWN), seed)
    rows = tuple(predictor.row(width, count) for width in widths if width.bits in wanted for count in sizes)
    clock.lap("predict")
    cuts = described_cuts(schedule, specialists, taken, there) + [bench.codes.cut] * bool(bench.codes.cut) + left_out
    if steps is None and clock.left < -_LATE * clock.seconds:
        cuts.append(f"even so it took {clock.used / 60:.1f} of {minutes:g} minutes")
    advice = Advice(
        base=base,
        sentence=advise_sentence(rows, _unlearnt(schedule) if any(width.steps for width in widths) else ""),
        pays_by_bandwidth=any(row.pays_by_bandwidth for row in rows),
        pays_by_storage=any(row.pays_by_storage for row in rows),
        rows=rows,
        widths=tuple(
            WidthFacts(
                bits=width.bits,
                bits_per_weight=bits_per_weight(width.bits),
                method=width.method,
                loss=float(width.generalist.nats[scored.judging].mean()),
                gap=predictor.gap(width),
                divergence=float(width.generalist.divergence[scored.judging].mean()),
                divergence_before=width.divergence_before,
                steps=width.steps,
            )
            for width in widths
        ),
        base_loss=float(scored.base[scored.judging].mean()),
        sampled=Sampled(
            window=window,
            windows=dict(zip(("calibration", "choice", "judging"), taken, strict=True)),
            judging_documents=len(set(sample.judging.document)),
            labels=samples.labels,
            clusters=by_cluster,
            router_tokens=router_tokens(window),
            router_accuracy=float((scored.routed == scored.label)[scored.judging].mean()),
            digests={
                "calibration": sample.calibration.digest,
                "choice": sample.choice.digest,
                "judging": sample.judging.digest,
            },
        ),
        steps=schedule.steps,
        own_steps=schedule.own_steps,
        full_steps=FULL.steps,
        full_own_steps=FULL_OWN,
        growth=growth,
        text_weight=text_weight,
        own_weight=own_weight,
        cut=tuple(cuts),
        seed=seed,
        seconds={step: round(value, 1) for step, value in clock.spent.items()},
    )
    if out is not None:
        write_advice(Path(out), advice)
    return advice


def _unlearnt(schedule: Schedule) -> str:
    """Why specialists that were trained and gained nothing may yet do so; empty where they had a build's time."""
    if 2 * schedule.own_steps > FULL_OWN:
        return ""
    return f"what specialists learn comes with the text they see, and they had {schedule.own_steps} steps of {FULL_OWN}"


def _checked(
    experts: Sequence[int], minutes: float, window: int, steps: int | None, data: Sequence[str | Source]
) -> tuple[int, ...]:
    """The sizes of mixtures in ascending order, each once. Raises RecipeError on an option that cannot be."""
    if not data:
        raise RecipeError("there is no data to advise on: give texts, `path` or `path=domain`")
    if not experts or min(experts) < 2:
        raise RecipeError("a mixture has 2 experts or more, the generalist counted: give such numbers as experts")
    if minutes <= 0:
        raise RecipeError(f"minutes must be above 0, not {minutes:g}")
    if window < 16:
        raise RecipeError(f"window must be 16 tokens or more, not {window}")
    if steps is not None and steps < 2:
        raise RecipeError(f"steps must be 2 or more, not {steps}")
    return tuple(sorted(set(experts)))


def _window_seconds(decoder: Decoder, samples: AdviceSamples) -> float:
    """Seconds of the base's forward pass over one window, from its first block, the second of two tries."""
    hidden = decoder.embed(samples.calibration.tokens[:_PROBE_WINDOWS])
    block, inputs = decoder.load_block(0), decoder.block_inputs(hidden)[0]
    elapsed = 0.0
    for _ in range(2):
        start = time.monotonic()
        decoder.run_block(block, hidden, inputs)
        elapsed = time.monotonic() - start
    decoder.release_block(0)
    return max(elapsed, 1e-6) * decoder.number_of_blocks / len(hidden)


def _sizes(decoder: Decoder, bits: Sequence[int]) -> dict[int, Size]:
    """Bytes of an expert of each width, what surrounds its blocks included, and of one more set of scales."""
    shape = measure_shape(decoder)
    outside = shape.other_parameters * shape.stored_bytes
    scales = shape.linear_weights * SCALE_BITS / GROUP_SIZE / 8
    return {width: Size(expert_block_bytes(shape, check(expert_of(width, RTN))) + outside, scales) for width in bits}
