"""Pictures for papers, PNG, SVG or PDF by the ending of the file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from mixhead.errors import MixheadError
from mixhead.files import writing
from mixhead.recording.names import short_name, short_names
from mixhead.report.comparison import pyplot
from mixhead.report.contents import Contents
from mixhead.report.html import competing_heads
from mixhead.report.statistics import ALWAYS
from mixhead.training.progress import read_rows

logger = logging.getLogger(__name__)

ENDINGS = (".png", ".svg", ".pdf")
ORDERED = ("position", "time_step")  # labels whose groups follow each other
# Okabe and Ito's colours, told apart with any colour vision.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#7f6fc9")


def plot(
    contents: Contents, file: Path, figure: str | None = None, by: str | None = None, layer: str | None = None
) -> None:
    """Draws the figure of that name.

    Args:
        contents: a recording.
        file: the picture to write.
        figure: one of `FIGURES`; by default "groups" where there is something to group by, else "loads".
        by: what to group by, for figures of groups.
        layer: for figures of one layer.

    Raises:
        MixheadError: where there is no such figure, or it cannot be drawn of this recording.
    """
    check_figure(file, figure)
    FIGURES[figure or ("loads" if by is None else "groups")](contents, file, by, layer)


def plot_load_by(contents: Contents, label: str, file: Path, layer: str | None = None, most: int = 8) -> None:
    """The head-load figure of the MoH paper: for each competing head a bar for each group, with its 95% band.

    Args:
        contents: a recording with labels.
        label: what to group by: `class`, `text`, `position`, `word class`, `time_step`, …
        file: the picture to write.
        layer: by default the last one in which heads compete, as in the paper.
        most: at most so many groups: those with most tokens, or spread evenly where they have an order.

    Raises:
        MixheadError: where nothing has that label.
    """
    layer = last_that_chooses(contents) if layer is None else layer
    groups = [group for group in contents.groups_by(label) if layer in group.loads]
    if not groups:
        known = ", ".join(dict.fromkeys(group.label for group in contents.groups)) or "nothing"
        raise MixheadError(f"The tokens of {layer} are not grouped by {label!r}; they are by {known}.")
    if label in ORDERED:
        groups = [groups[place] for place in sorted({*np.linspace(0, len(groups) - 1, most).round().astype(int)})]
        colours = pyplot().get_cmap("cividis")(np.linspace(0, 0.95, len(groups)))
    else:
        kept = sorted(groups, key=lambda group: -group.loads[layer].tokens)[:most]
        groups = [group for group in groups if group in kept]
        colours = COLOURS
    heads = competing_heads(contents, layer)
    plt = pyplot()
    figure, axes = plt.subplots(
        figsize=(max(4.0, 0.09 * len(heads) * (len(groups) + 1) + 1.2), 3.0), layout="constrained"
    )
    width = 0.85 / len(groups)
    for place, group in enumerate(groups):
        load = group.loads[layer]
        spread_H2 = np.nan_to_num(np.abs(load.band_H2 - load.share_H[:, None]))[heads]
        at = np.arange(len(heads)) + (place - (len(groups) - 1) / 2) * width
        axes.bar(
            at,
            load.share_H[heads],
            width,
            yerr=spread_H2.T,
            error_kw={"linewidth": 0.6},
            color=colours[place % len(colours)],
            label=f"{group.value} ({load.blocks:,})",
        )
    axes.set_xticks(range(len(heads)), [str(head) for head in heads], fontsize=8)
    axes.set_xlabel(f"head of layer {short_name(layer, contents.recording.layers)}")
    axes.set_ylabel("share of tokens")
    axes.set_ylim(0, 1)
    title = f"{label} ({next(axis.observations for axis in contents.axes if layer in axis.layers)})"
    figure.legend(title=title, fontsize=7, title_fontsize=7, ncols=4, loc="outside upper center", frameon=False)
    save(figure, file)


def last_that_chooses(contents: Contents) -> str:
    """The last layer whose tokens do not all use all heads; where there is none, the last that routes."""
    layers = contents.recording.layers
    return next((name for name in layers[::-1] if (contents.loads[name].share_H < ALWAYS).any()), layers[-1])


def plot_loads(contents: Contents, file: Path) -> None:
    """Load of every head of every layer, as a map."""
    names = contents.recording.layers
    most = max(len(load.share_H) for load in contents.loads.values())
    load_HL = np.full((most, len(names)), np.nan)
    for place, name in enumerate(names):
        load_HL[: len(contents.loads[name].share_H), place] = contents.loads[name].share_H
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(0.22 * len(names) + 2, 0.22 * most + 1.2), layout="constrained")
    image = axes.imshow(load_HL, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    step = max(1, len(names) // 16)
    axes.set_xticks(range(0, len(names), step), short_names(names)[::step], fontsize=8)
    axes.set_yticks(range(0, most, max(1, most // 16)))
    axes.set_xlabel("layer")
    axes.set_ylabel("head")
    figure.colorbar(image, label="share of tokens that use the head")
    save(figure, file)


# A new one is a function and a line here: (contents, file, what to group by, layer).
FIGURES: dict[str, Callable[[Contents, Path, str | None, str | None], None]] = {
    "loads": lambda contents, file, by, layer: plot_loads(contents, file),
    "groups": lambda contents, file, by, layer: plot_load_by(contents, by or "nothing", file, layer),
}


def plot_health(log: Path) -> Path | None:
    """The picture of a training run beside its log; None where there is nothing to draw or matplotlib is missing.

    Of several processes the main one draws.
    """
    if not PartialState().is_main_process:
        return None
    picture = log.with_name("routing.png")
    try:
        return picture if health_plot(log, picture) else None
    except MixheadError as error:
        logger.info("No picture of the routing was drawn. %s", error)
        return None


def health_plot(log: Path, file: Path) -> bool:
    """How evenly heads were used while a model was trained: loss, balance loss, loads and their entropy by step.

    Args:
        log: `log.csv` of a training run; columns that it lacks are left out.
        file: the picture to write.

    Returns:
        Whether there was anything to draw: a dense model has no routing health.
    """
    rows = read_rows(log)
    columns = {name: series(rows, name) for name in (rows[0] if rows else ())}
    known = {name for name, values in columns.items() if np.isfinite(values).any()}
    if not known & {"balance", "smallest_load", "largest_load", "load_entropy"}:
        return False
    panels = [panel for panel in PANELS if known & {*panel[1]}]
    layers = [name for name in columns if name.startswith("load_entropy_") and name in known]
    plt = pyplot()
    count = len(panels) + bool(layers)
    figure, all_axes = plt.subplots(
        count, 1, figsize=(7.0, 1.7 * count + 0.6), sharex=True, layout="constrained", squeeze=False
    )
    steps = columns["step"]
    for axes, (title, names) in zip(all_axes[:, 0], panels, strict=False):
        for place, name in enumerate(name for name in names if name in known):
            axes.plot(steps, columns[name], color=COLOURS[place], linewidth=1.2, label=name.replace("_", " "))
        axes.set_ylabel(title, fontsize=8)
        axes.legend(fontsize=7, loc="best")
    if layers:
        values_LS = np.stack([columns[name] for name in layers])
        half = (steps[-1] - steps[0]) / max(len(steps) - 1, 1) / 2 or 0.5
        edges = (steps[0] - half, steps[-1] + half, len(layers) - 0.5, -0.5)
        image = all_axes[-1, 0].imshow(values_LS, aspect="auto", cmap="cividis", vmin=0, vmax=1, extent=edges)
        step = max(1, len(layers) // 8)
        labels = [name.removeprefix("load_entropy_") for name in layers]
        all_axes[-1, 0].set_yticks(range(0, len(layers), step), labels[::step], fontsize=7)
        all_axes[-1, 0].set_ylabel("layer", fontsize=8)
        figure.colorbar(image, ax=all_axes[-1, 0], label="entropy of the loads")
    all_axes[-1, 0].xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    all_axes[-1, 0].set_xlabel("optimizer step")
    save(figure, file)
    return True


PANELS = (
    ("loss", ("loss", "cross_entropy", "distillation")),
    ("balance loss", ("balance",)),
    ("load", ("largest_load", "smallest_load")),
    ("evenness", ("load_entropy",)),
)


def series(rows: list[dict[str, str]], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """One column; NaN where it is empty or no number."""
    return np.array([number(row.get(name, "")) for row in rows])


def number(text: str) -> float:
    """What a cell holds."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def check_figure(file: Path, figure: str | None) -> None:
    """Raises where there is no figure of that name, or none can be written under the name of the file."""
    if figure is not None and figure not in FIGURES:
        raise MixheadError(f"There is no figure {figure!r}: choose one of {', '.join(FIGURES)}.")
    check_picture(file)


def check_picture(file: Path) -> None:
    """Raises a `MixheadError` where the name of a picture ends in what cannot be drawn, or nothing can be."""
    if file.suffix.lower() not in ENDINGS:
        raise MixheadError(
            f"A picture is written as {', '.join(ENDINGS)}, and {file} ends in {file.suffix or 'nothing'}."
        )
    pyplot()


def save(figure: Any, file: Path) -> None:
    """Writes a figure whole or not at all."""
    check_picture(file)
    try:
        with writing(file) as partial:
            figure.savefig(partial, dpi=150, format=file.suffix.lower().removeprefix("."))
    finally:
        pyplot().close(figure)
