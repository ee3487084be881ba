"""Measured speeds as a table and as a picture."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mixhead.bench.results import OK, WRONG, Results, Row
from mixhead.bench.timing import Ratio
from mixhead.errors import MixheadError
from mixhead.report.comparison import pyplot
from mixhead.report.plots import save

SHORT = {"forward + backward": "fwd + bwd", "float32": "fp32", "bfloat16": "bf16", "float64": "fp64"}


def speed_table(results: Results) -> Table:
    """A line for every row: ratios by wall clock / CPU time, times, memory, and what was to be reached."""
    machine = f"{results.machine['cpu']} ({results.machine['instruction_set']})"
    table = Table(
        title=f"Times faster than dense attention on all heads, wall clock / CPU time. {machine}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="dense: stock attention on all heads, without gates; masked: with them, as published code computes it.",
        caption_justify="left",
    )
    wanted = any(row.required is not None for row in results.rows)
    for name in ("", "case", "", "heads", "thr.", "engine"):
        table.add_column(name)
    for name in ("vs dense", "vs masked", "ms", "MiB (dense)", *(("required",) if wanted else ())):
        table.add_column(name, justify="right")
    for row in results.rows:
        routing = "" if row.routing == "random" else f" {Path(row.routing).name}"
        direction, dtype = SHORT.get(row.direction, row.direction), SHORT.get(row.dtype, row.dtype)
        cells = [direction, row.case, dtype, f"{row.share:.0%}{routing}", str(row.threads), row.engine]
        table.add_row(*cells, *measured_cells(row), *((required_cell(row),) if wanted else ()))
    return table


def measured_cells(row: Row) -> list[str]:
    """What was measured, or that nothing was."""
    if row.status != OK:
        colour = "red" if row.status == WRONG else "dim"
        return [f"[{colour}]{row.status}[/{colour}]", "", "", ""]
    memory = "" if row.memory_mib is None else f"{row.memory_mib:,.0f} ({row.dense_memory_mib:,.0f})"
    return [ratio_text(row.dense), ratio_text(row.gated), milliseconds(row.wall_ms), memory]


def milliseconds(value: float | None) -> str:
    """Three digits that say something."""
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def notes(results: Results) -> list[str]:
    """Why some rows were not measured, a line for each engine and reason."""
    return list(dict.fromkeys(f"{row.engine}: {row.status}, {row.note}" for row in results.rows if row.note))


def ratio_text(ratio: Ratio | None) -> str:
    """Wall clock / CPU time."""
    return "" if ratio is None else f"{ratio.wall:.2f} / {ratio.cpu:.2f}"


def required_cell(row: Row) -> str:
    """The ratio to reach, and whether it is."""
    if row.required is None:
        return ""
    verdict = {True: " [green]reached[/green]", False: " [red]missed[/red]", None: ""}[row.reached]
    return f"{row.required:.2f}{verdict}"


def speed_markdown(results: Results) -> str:
    """The results for a document: a line for each case and engine, a column for each share of the heads.

    A cell is how many times faster than dense attention (CPU time with one thread, else the wall clock), what was to be
    reached where that was missed, and the milliseconds of one run.
    """
    shares = sorted({row.share for row in results.rows}, reverse=True)
    lines: dict[tuple[str, ...], dict[float, Row]] = {}
    for row in results.rows:
        routing = "" if row.routing == "random" else f", {Path(row.routing).name} routing"
        name = f"{row.direction}, {row.case}{routing}"
        lines.setdefault((name, row.dtype, str(row.threads), row.engine), {})[row.share] = row
    machine = results.machine
    text = [
        f"`{results.command}`",
        "",
        ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in machine.items())
        + f", rounds: {results.rounds}",
        "",
        "| case | dtype | threads | engine |" + "".join(f" {share:.0%} of heads |" for share in shares),
        "|---|---|---|---|" + "---:|" * len(shares),
    ]
    for key, cells in lines.items():
        text.append(f"| {' | '.join(key)} |" + "".join(f" {markdown_cell(cells.get(share))} |" for share in shares))
    text += ["", *(f"- {note}" for note in notes(results))]
    return "\n".join(text).rstrip() + "\n"


def markdown_cell(row: Row | None) -> str:
    """Ratio, what was missed, milliseconds."""
    if row is None:
        return ""
    if row.status != OK or row.judged is None:
        return row.status
    value, took = (row.judged.wall, row.wall_ms) if row.threads > 1 else (row.judged.cpu, row.cpu_ms)
    missed = f" (missed: {row.required:.2f})" if row.reached is False else ""
    return f"{value:.2f}{missed}, {milliseconds(took)} ms"


def plot_speed(results: Results, file: Path) -> None:
    """A bar for every row: how many times faster than dense, by CPU time with one thread, else by the wall clock."""
    rows = [row for row in results.rows if row.dense is not None]
    if not rows:
        raise MixheadError("There is nothing to plot: nothing was timed.")
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9.0, 0.3 * len(rows) + 1.4), layout="constrained")
    names = [
        f"{row.direction}, {row.case}, {row.dtype}, {row.share:.0%}, {row.threads} thr., {row.engine}" for row in rows
    ]
    values = [row.dense.cpu if row.threads == 1 else row.dense.wall for row in rows if row.dense is not None]
    colours = {engine: f"C{index}" for index, engine in enumerate(dict.fromkeys(row.engine for row in rows))}
    bars = axes.barh(range(len(rows)), values, color=[colours[row.engine] for row in rows])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    for place, row in enumerate(rows):
        if row.required is not None:
            axes.plot([row.required] * 2, [place - 0.4, place + 0.4], color="black")
    axes.axvline(1.0, color="#888888", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(max(values), 1.0))
    axes.set_xlabel("times faster than dense attention on all heads (black: required)")
    save(figure, file)
