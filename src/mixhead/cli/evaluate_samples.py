"""`mixhead evaluate-samples`: how near drawn images are to real ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mixhead.cli.common import check_new, console, progress_bar

if TYPE_CHECKING:
    from torch import Tensor


def evaluate_samples(
    samples: Annotated[Path, typer.Argument(help="Folder of drawn images, as `mixhead sample` writes it.")],
    reference: Annotated[
        str, typer.Option(help="Real images: fashion-mnist, emoji, or a folder with one folder of images per class.")
    ],
    features: Annotated[
        str,
        typer.Option(
            help="What compares them: efficientnet-lite0, a file of Inception-v3 weights, or the folder of a small "
            "classifier (`mixhead train fashion-mnist-features`)."
        ),
    ] = "efficientnet-lite0",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what was measured to this file.")] = None,
) -> None:
    """Prints FID, sFID, Inception Score, precision and recall as the ADM evaluator defines them, and by which features.

    Figures by different features, or from different numbers of images, cannot be compared with each other.
    """
    from mixhead.data.labelled_images import open_images
    from mixhead.data.noised_images import image_tensors
    from mixhead.tasks.image_generation.drawing import image_batches
    from mixhead.tasks.image_generation.metrics import compare, feature_extractor, statistics

    check_new(json_file, overwrite=True)
    images = open_images(reference)
    extractor = feature_extractor(features)
    drawn = statistics(extractor, image_batches(samples))
    size = next(image_batches(samples, batch=1)).shape[-1]
    with progress_bar("Real images") as on_progress:
        real = statistics(extractor, counted(image_tensors(images, size, channels=3), len(images.labels), on_progress))
    quality = compare(extractor.name, drawn, real)
    console.print(table_of(quality))
    if json_file is not None:
        json_file.write_text(json.dumps(quality, indent=2) + "\n", encoding="utf-8")


def counted(batches: Iterator[Tensor], total: int, on_progress: Callable[[int, int], None]) -> Iterator[Tensor]:
    """The same batches, with progress in images."""
    done = 0
    for batch in batches:
        yield batch
        done += len(batch)
        on_progress(done, total)


def table_of(quality: Mapping[str, Any]) -> Table:
    """What was measured, for the terminal."""
    from mixhead.tasks.image_generation.metrics import METRICS

    table = Table("measure", "value", title=f"Features: {quality['extractor']}", box=None)
    for name, metric in METRICS.items():
        table.add_row(metric.title, "-" if quality[name] is None else f"{quality[name]:.4f}")
    table.add_row("drawn images", f"{quality['generated']:,}")
    table.add_row("real images", f"{quality['real']:,}")
    return table
