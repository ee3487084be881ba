"""`mixhead bench`: how fast, against dense attention, on this machine; checked before it is timed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from mixhead.bench import cases
from mixhead.cli.common import MODEL_HELP, TEXT_HELP, console, model_folder, progress_bar, windows_of
from mixhead.errors import MixheadError
from mixhead.tasks.language_modelling.config import SMOLLM2

if TYPE_CHECKING:
    from mixhead.bench import runner
    from mixhead.bench.subject import Spec


app = typer.Typer(no_args_is_help=True)

ROUTING_HELP = "random, skewed (one head used by 90% of the tokens, one by 10%), or a file of `mixhead bench record`."
Directions = Annotated[str, typer.Option(help="forward, backward (forward + backward), decode; or several: a,b.")]
Share = Annotated[str, typer.Option(help="Shares of the heads that are active.")]
Engine = Annotated[str, typer.Option(help="masked, auto, or engines of mixhead.ops; all of them by default.")]
Threads = Annotated[str, typer.Option(help="Numbers of threads.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16.")]
RoutingKind = Annotated[str, typer.Option(help=ROUTING_HELP)]
OwnRouting = Annotated[str, typer.Option(help=ROUTING_HELP + " Or own: the routers' own choice.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often all take their turn; the median counts.")]
Seconds = Annotated[float, typer.Option(min=0.0, help="Least time of one measurement.")]
Memory = Annotated[bool, typer.Option(help="Measure peak memory too, each in a process of its own.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write all that is measured to this file, row by row.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the ratios into this PNG file.")]
Markdown = Annotated[Path | None, typer.Option(help="Write a table for a document into this file.")]
Tokens = Annotated[str, typer.Option(help="Tokens; cached keys in decode.")]
Batch = Annotated[str, typer.Option(help="Batch sizes.")]
Heads = Annotated[int, typer.Option(min=1, help="Query heads.")]
KvHeads = Annotated[int | None, typer.Option(min=1, help="Key-value heads; as many as query heads by default.")]
HeadDim = Annotated[int, typer.Option(min=1, help="Size of a head.")]
Mask = Annotated[str, typer.Option(help="bidirectional, causal.")]

PROMPT = 1024  # tokens that are recorded where nobody says how many

T = TypeVar("T")


@app.command("core")
def core(
    preset: Annotated[
        str | None,
        typer.Option(help=f"Cases by name instead of by size: {', '.join(cases.PRESETS)}, or {cases.FIGURES}."),
    ] = None,
    only: Annotated[str, typer.Option(help="Of a preset, the cases whose description contains this.")] = "",
    direction: Directions = "forward",
    batch: Batch = "1",
    tokens: Tokens = "1024",
    mask: Mask = "bidirectional",
    heads: Heads = 16,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = 64,
    share: Share = "1,0.75,0.5,0.25",
    routing: RoutingKind = "random",
    by_token: Annotated[bool, typer.Option("--by-token", help="q, k, v as projections lay them out.")] = False,
    dtype: Dtype = "float32",
    engine: Engine = "",
    threads: Threads = "1",
    rounds: Rounds = 7,
    seconds: Seconds = 0.02,
    memory: Memory = True,
    json_file: Json = None,
    plot: Plot = None,
    markdown: Markdown = None,
) -> None:
    """`head_attention` against dense attention on all heads.

    `--preset figures` measures `auto` at every case that has a figure to reach, and says whether it does.
    """
    from mixhead.bench import runner
    from mixhead.bench.core import CoreSpec
    from mixhead.bench.subject import engine_name, engines_to_time

    counts, engines = many(threads, positive), many(engine, engine_name) or engines_to_time()
    if preset == cases.FIGURES:
        wanted = [figure for figure in cases.figures() if only in f"{figure.case.direction}, {figure.case.title}"]
        entries = list(runner.entries_of_figures(wanted, many(engine, engine_name) or ["auto"], counts))
    else:
        shape = cases.Case(heads=heads, kv_heads=kv_heads or heads, head_dim=head_dim)
        chosen = preset_cases(preset, only) or list(
            runner.grid(many(batch, positive), many(tokens, positive), masks(mask), directions(direction), shape)
        )
        specs: list[Spec] = [
            CoreSpec(case, kind, routing, part, by_token)
            for kind in many(dtype, str)
            for case in chosen
            for part in many(share, share_of_heads)
        ]
        entries = list(runner.entries_of_specs(specs, engines, counts))
    measure(entries, runner.Options(rounds, seconds, memory), Files(json_file, plot, markdown))


@app.command("module")
def module(
    direction: Directions = "forward",
    batch: Batch = "1",
    tokens: Tokens = "1024",
    mask: Mask = "bidirectional",
    heads: Heads = 16,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = 64,
    share: Share = "0.75,0.5,0.25",
    routing: OwnRouting = "random",
    dtype: Dtype = "float32",
    engine: Engine = "",
    threads: Threads = "1",
    rounds: Rounds = 7,
    seconds: Seconds = 0.02,
    memory: Memory = True,
    json_file: Json = None,
    plot: Plot = None,
    markdown: Markdown = None,
) -> None:
    """`MixtureOfHeadAttention` against the same projections around dense attention, without a router."""
    from mixhead.bench import runner
    from mixhead.bench.module import ModuleSpec
    from mixhead.bench.subject import engine_name, engines_to_time

    shape = cases.Case(heads=heads, kv_heads=kv_heads or heads, head_dim=head_dim)
    chosen = runner.grid(many(batch, positive), many(tokens, positive), masks(mask), directions(direction), shape)
    specs: list[Spec] = [
        ModuleSpec(case, kind, routing, part)
        for case in chosen
        for kind in many(dtype, str)
        for part in many(share, share_of_heads)
    ]
    entries = runner.entries_of_specs(specs, many(engine, engine_name) or engines_to_time(), many(threads, positive))
    measure(list(entries), runner.Options(rounds, seconds, memory), Files(json_file, plot, markdown))


@app.command("model")
def whole_model(
    source: Annotated[
        str,
        typer.Argument(
            help=MODEL_HELP + " Or the shape of one with random weights: llama:layers=4,hidden=576,heads=9."
        ),
    ],
    active: Annotated[float, typer.Option(help="Share of all heads that a token uses.")] = 0.75,
    active_heads: Annotated[int | None, typer.Option(help="--active as heads of a layer.")] = None,
    router: Annotated[str, typer.Option(help="linear, query_norm or two_stage.")] = "linear",
    direction: Directions = "forward",
    batch: Batch = "1",
    tokens: Tokens = "1024",
    routing: OwnRouting = "random",
    dtype: Dtype = "float32",
    engine: Engine = "masked,auto",
    threads: Threads = "1",
    rounds: Rounds = 7,
    seconds: Seconds = 0.02,
    memory: Memory = True,
    json_file: Json = None,
    plot: Plot = None,
    markdown: Markdown = None,
) -> None:
    """A causal language model, converted, against its dense self with the same weights.

    forward is a prefill, decode one token against `--tokens` cached ones, backward a forward and a backward pass.
    """
    from mixhead.bench import model, runner
    from mixhead.bench.subject import engine_name
    from mixhead.convert import MoHConfig

    folder = str(model_folder(source)) if source == SMOLLM2 else source
    config = MoHConfig(active=active, active_heads=active_heads, router=router)
    specs: list[Spec] = [
        model.ModelSpec(folder, config, model.DIRECTIONS[way], rows, length, kind, routing)
        for way in directions(direction)
        for length in many(tokens, positive)
        for rows in many(batch, positive)
        for kind in many(dtype, str)
    ]
    entries = list(runner.entries_of_specs(specs, many(engine, engine_name), many(threads, positive)))
    measure(entries, runner.Options(rounds, seconds, memory), Files(json_file, plot, markdown))


@app.command("record")
def record(
    source: Annotated[str, typer.Argument(help="A converted model's folder.")],
    out: Annotated[Path, typer.Argument(help="The file to write, safetensors.")],
    text: Annotated[str, typer.Option(help="Text to read. " + TEXT_HELP)] = "addresses:test",
    tokens: Annotated[
        int | None,
        typer.Option(min=2, help=f"Tokens of the prompt; by default {PROMPT}, or as many as the model has positions."),
    ] = None,
) -> None:
    """Writes which heads a converted model's tokens use, for `--routing FILE`."""
    from mixhead import store
    from mixhead.bench import routings
    from mixhead.data.text import text_source
    from mixhead.models.context import check_ids, window_for

    documents = text_source(text, "test")
    network, tokenizer = store.load_causal_lm(model_folder(source))
    length = window_for([network], tokens, PROMPT)
    windows_WT = windows_of(tokenizer, documents, length, length).ids_WT
    check_ids(network, windows_WT)
    layers = routings.record(network, windows_WT[:1], out)
    console.print(f"Wrote {out}: {layers} layers, {windows_WT.shape[1]:,} tokens.")


@dataclass(frozen=True)
class Files:
    """Where results are written, if anywhere."""

    json: Path | None
    plot: Path | None
    markdown: Path | None

    def check(self) -> None:
        """Raises where one of them could not be written: better before long measurements than after."""
        from mixhead.report.plots import check_picture

        if self.plot is not None:
            check_picture(self.plot)
        for file in (self.json, self.plot, self.markdown):
            if file is not None and not file.parent.is_dir():
                raise MixheadError(f"{file} cannot be written: there is no folder {file.parent}.")


def measure(entries: list[runner.Entry], options: runner.Options, files: Files) -> None:
    """Measures and prints; ends with code 1 where a result was wrong, and 130 after Ctrl-C, which keeps the rows."""
    from mixhead.bench import runner
    from mixhead.bench.results import Results, Row, met
    from mixhead.files import write_text
    from mixhead.report.speed import notes, plot_speed, speed_markdown, speed_table

    if not entries:
        raise MixheadError("Nothing fits that description, so nothing was measured.")
    files.check()
    results = Results(shlex.join(["mixhead", *sys.argv[1:]]), options.rounds)
    interrupted = False

    def keep(row: Row) -> None:
        results.rows.append(row)
        if files.json is not None:
            results.write(files.json)

    try:
        with progress_bar("Measuring") as on_progress:
            runner.run(entries, options, keep, on_progress)
    except KeyboardInterrupt:
        interrupted = True
    console.print(speed_table(results))
    for note in notes(results):
        console.print(note, markup=False, highlight=False)
    reached, wanted = met(results.rows)
    if wanted:
        console.print(f"{reached} of {wanted} figures are reached.")
    if files.plot is not None and any(row.dense for row in results.rows):
        plot_speed(results, files.plot)
    if files.markdown is not None:
        write_text(files.markdown, speed_markdown(results))
    if interrupted:
        console.print(f"Interrupted after {len(results.rows)} of {len(entries)} rows.")
        raise typer.Exit(130)
    if results.wrong:
        console.print("[red]A result was wrong[/red], so it was not timed.")
        raise typer.Exit(1)


def preset_cases(preset: str | None, only: str) -> list[cases.Case]:
    """The cases of a preset; none where none is named."""
    if preset is None:
        return []
    if preset not in cases.PRESETS:
        raise MixheadError(f"--preset {preset} is unknown: {', '.join(cases.PRESETS)} and {cases.FIGURES} are known.")
    found = [case for case in cases.PRESETS[preset] if only in f"{case.direction}, {case.title}"]
    if not found:
        raise MixheadError(f"No case of the preset {preset} contains {only!r}.")
    return found


def many(text: str, read: Callable[[str], T]) -> list[T]:
    """The values of a list written `a,b` or `a b`."""
    return [read(part) for part in text.replace(",", " ").split()]


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise MixheadError(f"{text!r} is no whole number above 0.")
    return int(text)


def share_of_heads(text: str) -> float:
    """A number above 0 and at most 1."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise MixheadError(f"--share {text} is no share of the heads: it must lie above 0 and at most at 1.")
    return share


def masks(text: str) -> list[bool]:
    """Whether each mask is causal."""
    return [choice(part, ("bidirectional", "causal"), "--mask") == "causal" for part in many(text, str)]


def directions(text: str) -> list[str]:
    """Checked names of what is computed."""
    from mixhead.bench import model

    return [choice(part, tuple(model.DIRECTIONS), "--direction") for part in many(text, str)]


def choice(text: str, known: Sequence[str], option: str) -> str:
    """One of the known words."""
    if text not in known:
        raise MixheadError(f"{option} {text} is unknown: choose from {', '.join(known)}.")
    return text
