"""The command line. Every verb is a public function of the package; `--json` prints what the function returned.

Mistakes that a user can mend end with one line on standard error and exit code 2; Ctrl-C leaves a folder that the same
command continues, and exits with 130.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moqe.errors import MoqeError
from moqe.progress import Advance
from moqe.version import __version__

if TYPE_CHECKING:
    from moqe.build import BuildResult

app = typer.Typer(
    name="moqe",
    help="Mixture of Quantization Experts: several quantized variants of one model, and a router that picks per input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Dir = Annotated[Path, typer.Argument(help="The mixture's folder.", metavar="DIR")]
Text = Annotated[str, typer.Argument(help="The text; `-` reads standard input.")]
Pin = Annotated[str | None, typer.Option("--expert", help="Use this expert instead of the router's choice.")]


class Bars:
    """Progress bars with time left, on standard error; silent when that is not a terminal."""

    def __init__(self) -> None:
        from huggingface_hub.utils.tqdm import enable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        self.console = Console(stderr=True)
        disable_progress_bar()  # its bars would run through ours
        if self.console.is_terminal:
            enable_progress_bars()  # of downloads, which come before any bar of ours

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Advance]:
        """Show one bar for `total` steps of `what`."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        if not self.console.is_terminal:
            logging.getLogger("moqe").info("%s (%d steps)", what, total)
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True) as bars:
            task = bars.add_task(escape(what), total=total)
            yield lambda steps: bars.advance(task, steps)


def _emit(value: Any) -> None:
    """Print a result as JSON."""
    content = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def _read(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def _say(message: str = "") -> None:
    Console().print(message, soft_wrap=True)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on standard error.")] = False,
) -> None:
    if version:
        _say(f"moqe {__version__}")
        raise typer.Exit
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Argument(help="Where to put the mixture.", metavar="DIR")] = Path("moqe-quickstart"),
    task: Annotated[str, typer.Option(help="What the bundled model does: language or image-classification.")] = (
        "language"
    ),
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Build and judge a mixture of a bundled model: a few minutes, no network."""
    from moqe.verbs import quickstart as make

    _show_build(make(folder, task=task, device=device, progress=Bars()), as_json)


@app.command()
def build(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).", metavar="RECIPE")],
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="The mixture's folder; by default the recipe's name.")
    ] = None,
    device: Device = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print predicted time, RAM and disk; make nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make experts, loss table, router and verdict from a recipe. The same command resumes an interrupted build."""
    from moqe.recipe import load_recipe

    parsed, target = load_recipe(recipe), folder or Path(recipe.stem)
    if dry_run:
        from moqe.build import plan
        from moqe.evaluate.terminal import plan_table

        prediction = plan(parsed, device, Bars()).summary()
        if as_json:
            _emit(prediction)
        else:
            Console().print(plan_table(prediction))
        return
    from moqe.build import build as make

    _show_build(make(parsed, target, device=device, progress=Bars()), as_json)


def _show_build(result: BuildResult, as_json: bool) -> None:
    from moqe.evaluate.terminal import verdict_renderable

    if as_json:
        _emit(result.summary())
        return
    Console().print(verdict_renderable(result.verdict))
    _say(f"[dim]{escape(result.sentence())}[/dim]")
    _say(f"Report: {escape(str(result.folder / 'report.html'))}")


@app.command()
def evaluate(
    folder: Dir,
    runtime: Annotated[
        str | None, typer.Option(help="Also compare this runtime with the reference, for the report.")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Judge a mixture again: score what is missing from the loss table, then write verdict, report and card."""
    from moqe.build import evaluate as judge
    from moqe.evaluate.terminal import verdict_renderable

    verdict = judge(folder, runtime=runtime, device=device, progress=Bars())
    if as_json:
        _emit(verdict)
    else:
        Console().print(verdict_renderable(verdict))


@app.command()
def route(
    folder: Dir,
    sample: Annotated[str, typer.Argument(help="The text, `-` for standard input; or an image's path.")],
    protocol: Annotated[
        str | None, typer.Option(help="What the router may see, if not what it was deployed for.")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Say which expert the router sends an input to, and what it predicts for each."""
    from moqe.verbs import route as ask

    decision = ask(folder, _read(sample), protocol=protocol, device=device, progress=Bars())
    if as_json:
        _emit(decision)
        return
    _say(f"[bold]{escape(decision.expert)}[/bold]  {escape(decision.reason)}")
    for name, cost in sorted(decision.costs.items(), key=lambda item: item[1]):
        _say(f"  {escape(name):24} {cost:+.4f} {decision.unit}")


@app.command()
def generate(
    folder: Dir,
    text: Text,
    expert: Pin = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Continue a text with the expert that the router chooses."""
    from moqe.verbs import generate as ask

    answer = ask(
        folder,
        _read(text),
        expert=expert,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=device,
        progress=Bars(),
    )
    if as_json:
        _emit(answer)
        return
    sys.stdout.write(answer.text + "\n")
    Console(stderr=True).print(f"[dim]expert: {escape(answer.expert)} ({escape(answer.reason)})[/dim]")


@app.command()
def classify(
    folder: Dir,
    image: Annotated[Path, typer.Argument(help="An image file.", metavar="IMAGE")],
    expert: Pin = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Name what an image shows, with the expert that the router chooses."""
    from moqe.verbs import classify as ask

    answer = ask(folder, image, expert=expert, device=device, progress=Bars())
    if as_json:
        _emit(answer)
        return
    for label, probability in answer.top.items():
        _say(f"{escape(label):24} {probability:.4f}")
    asked = escape(answer.expert) + (f", then {escape(answer.second)}" if answer.second else "")
    Console(stderr=True).print(f"[dim]expert: {asked} ({escape(answer.reason)})[/dim]")


@app.command()
def inspect(
    folder: Dir,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read shared files and experts, and compare digests.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a mixture is made of: recipe, experts, certificates, bytes, verdict."""
    from moqe.evaluate.terminal import inspection_table
    from moqe.mixture import inspect as look

    found = look(folder, verify=verify, progress=Bars())
    if as_json:
        _emit(found)
    else:
        Console().print(inspection_table(found))


@app.command()
def export(
    folder: Dir,
    to: Annotated[str, typer.Option(help="gguf, compressed-tensors, or onnx for images.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A new folder; by default the mixture's name and the format.")
    ] = None,
    experts: Annotated[list[str], typer.Option("--expert", help="Only this one; may be given several times.")] = [],  # noqa: B006
    rounding: Annotated[
        bool, typer.Option("--rounding", help="Let GGUF round scales where that makes a file possible or smaller.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write experts as plain files for llama.cpp, Ollama, LM Studio, transformers, vLLM or ONNX Runtime."""
    from moqe.export import export as write

    done = write(folder, to, out, experts=experts, rounding=rounding, progress=Bars())
    if as_json:
        _emit(done)
        return
    for name, entry in done.experts.items():
        largest = max((found["largest_error"] for found in entry.get("rounded", {}).values()), default=0.0)
        note = (
            f"  [yellow]scales rounded, largest error {largest:.1e} of the largest weight[/yellow]" if largest else ""
        )
        _say(f"  {escape(name):24} {escape(str(done.folder / (entry.get('file') or entry['folder'])))}{note}")


@app.command()
def bench(
    folder: Dir,
    runtime: Annotated[
        str | None, typer.Option(help="packed, packed-float32, llama.cpp or onnx; by default what suits each expert.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 64,
    requests: Annotated[int, typer.Option(min=1, help="Measured answers of each.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="Of one answer; by default torch's number.")] = None,
    memory: Annotated[bool, typer.Option(help="Start a process for each to see what stays in memory.")] = True,
    as_json: Json = False,
) -> None:
    """Measure latency, tokens per second and memory of every expert, the router and the mixture."""
    from moqe.speed import bench as measure
    from moqe.speed.page import bench_renderable

    found = measure(
        folder,
        runtime=runtime,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        requests=requests,
        threads=threads,
        memory=memory,
        progress=Bars(),
    )
    if as_json:
        _emit(found)
    else:
        Console().print(bench_renderable(found))


class _Lists(typer.core.TyperCommand):
    """A command whose list options take all values up to the next option: `--bits 2 3 4`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before every further value."""
        lists = {name for option in self.params if option.multiple for name in option.opts}
        current, spread = "", []
        for number, word in enumerate(args):
            if word.startswith("--"):
                current = word if word in lists else ""
            elif current and args[number - 1] != current:
                spread.append(current)
            spread.append(word)
        return super().parse_args(ctx, spread)


@app.command(cls=_Lists)
def advise(
    base: Annotated[str, typer.Argument(help="The full-precision model, as in a recipe.", metavar="BASE")],
    data: Annotated[list[str], typer.Option(help="Texts: paths, hub ids, bundled names; `path=domain` labels one.")],
    bits: Annotated[list[int], typer.Option(help="Widths of the codes.")] = [2, 3, 4, 8],  # noqa: B006
    experts: Annotated[list[int], typer.Option(help="Sizes of mixtures, the generalist counted.")] = [2, 4, 6],  # noqa: B006
    minutes: Annotated[float, typer.Option(help="How long it may take.")] = 10.0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for advice.json and advice.png.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of a sample.")] = 256,
    steps: Annotated[int | None, typer.Option(help="Steps of distillation, instead of as many as fit.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Predict in minutes, from a sample, whether a mixture of specialists is worth building."""
    from moqe.advice import advise as ask
    from moqe.advice.page import advice_renderable

    advice = ask(
        base,
        data,
        bits=bits,
        experts=experts,
        minutes=minutes,
        out=out,
        window=window,
        steps=steps,
        seed=seed,
        device=device,
        progress=Bars(),
    )
    if as_json:
        _emit(advice)
        return
    Console().print(advice_renderable(advice))
    if out is not None:
        _say(f"Plot: {escape(str(out / 'advice.png'))}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine offers: versions, threads, instruction sets, devices, optional packages."""
    from moqe.doctor import doctor as examine

    report = examine()
    if as_json:
        _emit(report)
        return
    for section, entries in report.items():
        _say(f"[bold]{escape(section)}[/bold]")
        for name, value in entries.items():
            _say(f"  {escape(name):24} {escape(str(value))}")


def main() -> None:
    """Entry point: run the command line, turn errors into one line and exit code 2."""
    try:
        app(standalone_mode=False)
    except MoqeError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(' '.join(str(error).split()))}", soft_wrap=True)
        sys.exit(2)
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        Console(stderr=True).print("interrupted: the same command continues where it stopped", soft_wrap=True)
        sys.exit(130)
    except Exception as error:
        # A wrong use of the command line. Typer has a copy of click of its own, so the class cannot be named.
        show = getattr(error, "show", None)
        if show is None or not hasattr(error, "format_message"):
            raise
        show()
        sys.exit(2)
