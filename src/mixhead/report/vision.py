"""Image classifiers in tables and pictures: accuracy, confusion, the load of heads by class, maps of heads.

Shape legend: C classes, L labels, H heads, Y and X rows and columns.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from mixhead.errors import MixheadError, listed
from mixhead.intervals import MOST_FREEDOM, share_band
from mixhead.recording.names import short_name
from mixhead.report.comparison import pyplot
from mixhead.tasks.image_classification.classify import Classification, HeadMap
from mixhead.tasks.image_classification.evaluate import ImageEvaluation

MOST_CLASSES = 20  # in a picture whose classes have names
COLUMNS = 8  # maps of heads in a row


def accuracy_table(result: ImageEvaluation, name: str) -> Table:
    """What was measured, a line each."""
    table = Table(title=name, title_justify="left", box=None, show_header=False)
    rows = {
        "images": f"{result.images:,}",
        "top-1": with_band(result.top1_accuracy, result.images),
        "top-5": with_band(result.top5_accuracy, result.images),
        "heads used": f"{result.active_share:.1%}",
        "images per second": f"{result.images / result.seconds:,.0f}",
        "images per second, model alone": f"{result.images / result.model_seconds:,.0f}",
    }
    if result.unreadable:
        rows["left out, unreadable"] = f"{len(result.unreadable)}: {listed(list(result.unreadable), 3)}"
    for row in rows.items():
        table.add_row(*row)
    return table


def with_band(share: float, images: int) -> str:
    """A share of so many images with its 95% band."""
    low, high = share_band(np.array([share]), np.array([images]), MOST_FREEDOM)[0]
    return f"{share:.2%} ({100 * low:.1f}–{100 * high:.1f})"


def class_table(result: ImageEvaluation) -> Table:
    """For each class: images, how many of them were recognised, what they were taken for instead."""
    table = Table("class", "images", "recognised", "most often taken for", box=None)
    for number, name in enumerate(result.classes[:MOST_CLASSES]):
        row_L = result.confusion_CL[number]
        total, right = int(row_L.sum()), int(row_L[number])
        others_L = row_L.clone()
        others_L[number] = 0
        other = int(others_L.argmax())
        wrong = f"{result.classes[other]} ({int(others_L[other]) / total:.1%})" if others_L.any() else ""
        table.add_row(name, f"{total:,}", f"{right / total:.1%}" if total else "", wrong)
    return table


def write_confusion(result: ImageEvaluation, file: Path) -> None:
    """The confusion matrix as CSV: a line per true class, a column per class that the model took for the likeliest."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["true class", *result.classes])
        for name, row in zip(result.classes, result.confusion_CL.tolist(), strict=True):
            writer.writerow([name, *row])


def plot_confusion(result: ImageEvaluation, file: Path) -> None:
    """The confusion matrix as a picture: shares of each true class; numbers where there are few classes."""
    plt = pyplot()
    share_CL = (result.confusion_CL / result.confusion_CL.sum(1, keepdim=True).clamp(min=1)).numpy()
    classes = len(result.classes)
    side = min(4.0 + 0.35 * classes, 12.0)
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    axes.imshow(share_CL, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xlabel("taken for")
    axes.set_ylabel("true class")
    if classes <= MOST_CLASSES:
        axes.set_xticks(range(classes), [plain(name) for name in result.classes], rotation=60, ha="right")
        axes.set_yticks(range(classes), [plain(name) for name in result.classes])
        for row, column in np.argwhere(share_CL > 0.005):
            colour = "white" if share_CL[row, column] > 0.6 else "black"
            axes.text(column, row, f"{100 * share_CL[row, column]:.0f}", ha="center", va="center", color=colour)
    axes.set_title(f"{result.images:,} images, top-1 {result.top1_accuracy:.1%} (numbers: % of the true class)")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def plot_load(result: ImageEvaluation, file: Path, classes: Sequence[str] = (), layer: str | None = None) -> None:
    """Load of the heads by class, as in figure 3 of the MoH paper: a panel per class, a bar per routed head.

    Args:
        result: of an evaluation.
        file: the picture to write.
        classes: which to show; by default the first eight that have images.
        layer: which to show; by default the last one in which heads compete.

    Raises:
        MixheadError: where no heads compete, or a class or layer is unknown.
    """
    layer = routed_layer(result) if layer is None else layer
    if layer not in result.load:
        raise MixheadError(f"The layer {layer} does not route; those that do: {', '.join(result.load) or 'none'}.")
    load_CH, competes_H = result.load[layer], result.competes[layer]
    with_images = [name for name, load_H in zip(result.classes, load_CH, strict=True) if not load_H.isnan().any()]
    shown = list(classes) or with_images[:8]
    unknown = [name for name in shown if name not in with_images]
    if unknown:
        raise MixheadError(f"The class {unknown[0]!r} is unknown or has no image.")
    plt = pyplot()
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.2 * columns, 2.1 * rows + 0.6), sharey=True, squeeze=False, layout="constrained"
    )
    heads = competes_H.nonzero().flatten().tolist()
    even = float(load_CH.nanmean(0)[competes_H].mean())
    for place, axes in enumerate(grid.flat):
        if place >= len(shown):
            axes.axis("off")
            continue
        load_H = load_CH[result.classes.index(shown[place])][competes_H]
        axes.bar(range(len(heads)), load_H.tolist(), color="#3b75af")
        axes.axhline(even, color="#888888", linewidth=1, linestyle=":")
        axes.set_title(plain(shown[place]), fontsize=10)
        axes.set_xticks(range(len(heads)), heads, fontsize=7)
        axes.set_ylim(0.0, 1.0)
    figure.supxlabel("head")
    figure.supylabel("share of the patches that use it")
    figure.suptitle(
        f"Load of the routed heads in layer {short_name(layer, list(result.load))} (dotted: mean)", fontsize=11
    )
    figure.savefig(file, dpi=120)
    plt.close(figure)


def routed_layer(result: ImageEvaluation) -> str:
    """The last layer in which heads compete."""
    found = [name for name, competes_H in result.competes.items() if competes_H.any()]
    if not found:
        raise MixheadError(
            "No heads compete in this model: every patch uses the same ones, so there is no load to show."
        )
    return found[-1]


def plot_heads(image: Classification, file: Path, layer: str | None = None) -> None:
    """The image, how many heads carry the weight of each patch, and which patches used each routed head.

    Args:
        image: what was found out about it.
        file: the picture to write.
        layer: which to show; by default the last one in which heads compete.

    Raises:
        MixheadError: where the layer is unknown, or the model is dense.
    """
    heads = image.map_of(layer)
    plt = pyplot()
    picture_YXC = as_picture(image.pixels_CYX)
    numbers = heads.competes_H.nonzero().flatten().tolist()
    panels = 2 + len(numbers)
    rows = math.ceil(panels / COLUMNS)
    columns = min(panels, COLUMNS)
    figure, grid = plt.subplots(
        rows, columns, figsize=(1.9 * columns, 2.1 * rows + 0.7), squeeze=False, layout="constrained"
    )
    for axes in grid.flat:
        axes.axis("off")
    first, second, *others = grid.flat
    first.imshow(picture_YXC)
    first.set_title(f"{plain(image.labels[0])} {image.probabilities[0]:.0%}", fontsize=9)
    draw_number_of_heads(figure, second, picture_YXC, heads)
    for axes, head in zip(others, numbers, strict=False):
        draw_head(axes, picture_YXC, heads.selected_YXH[..., head], head)
    used = heads.selected_YXH.sum(-1).float().mean()
    name = short_name(heads.layer, [of.layer for of in image.maps])
    figure.suptitle(f"layer {name}: {float(used):.3g} of {heads.selected_YXH.shape[-1]} heads a patch", fontsize=10)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def draw_number_of_heads(figure: Any, axes: Any, picture_YXC: np.ndarray, heads: HeadMap) -> None:
    """How many heads carry the weight of a patch, over the image."""
    axes.imshow(picture_YXC)
    values = axes.imshow(
        heads.carrying_YX.numpy(), cmap="viridis", alpha=0.65, extent=edges_of(picture_YXC), interpolation="nearest"
    )
    figure.colorbar(values, ax=axes, shrink=0.7)
    axes.set_title("heads that carry\nthe weight", fontsize=9)


def draw_head(axes: Any, picture_YXC: np.ndarray, selected_YX: Tensor, head: int) -> None:
    """The patches that used a head can be seen, the others lie under grey, which shows on black and on white."""
    axes.imshow(picture_YXC)
    veil_YXC = np.full((*selected_YX.shape, 4), 0.5)
    veil_YXC[..., 3] = np.where(selected_YX.numpy(), 0.0, 0.85)
    axes.imshow(veil_YXC, extent=edges_of(picture_YXC), interpolation="nearest")
    axes.set_title(f"head {head}: {float(selected_YX.float().mean()):.0%}", fontsize=9)


def edges_of(picture_YXC: np.ndarray) -> tuple[float, float, float, float]:
    """Where matplotlib draws the left, right, lower and upper edge of a picture: pixels lie around whole numbers."""
    rows, columns = picture_YXC.shape[:2]
    return -0.5, columns - 0.5, rows - 0.5, -0.5


def as_picture(pixels_CYX: Tensor) -> np.ndarray:
    """Normalised pixels as a picture in [0, 1], [Y, X, C], stretched to the whole range."""
    low, high = torch.aminmax(pixels_CYX)
    stretched_CYX = (pixels_CYX - low) / (high - low).clamp(min=1e-6)
    return stretched_CYX.permute(1, 2, 0).numpy()


def plain(name: str) -> str:
    """A name as text: matplotlib would read dollar signs as mathematics."""
    return name.replace("$", r"\$")
