"""`mixhead evaluate-images`: accuracy, confusion, speed and the load of heads of an image classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixhead.cli.common import DTYPE_HELP, check_new_folder, console, progress_bar


def evaluate_images(
    model: Annotated[Path, typer.Argument(help="A folder with an image classifier: MoH-ViT, converted or plain.")],
    data: Annotated[
        str,
        typer.Argument(
            help="A folder with one folder of images per class, or with `val` above these; a Hugging Face dataset on "
            "disk; or fashion-mnist."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results.json, confusion.csv, confusion.png and load.png (load of the heads)."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    layer: Annotated[str | None, typer.Option(help="Layer of load.png; the last one whose heads compete.")] = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Class to show in load.png, several times; the first eight.")
    ] = None,
) -> None:
    """Measures an image classifier on labelled images; what cannot be read is left out and listed."""
    from mixhead.data.labelled_images import check_classes, open_images, renumbered
    from mixhead.files import write_text
    from mixhead.precision import autocast_dtype
    from mixhead.recording.listen import routers_by_layer
    from mixhead.recording.names import layer_named
    from mixhead.report.comparison import pyplot
    from mixhead.report.vision import accuracy_table, class_table, plot_confusion, plot_load, write_confusion
    from mixhead.tasks.image_classification.evaluate import evaluate_images as measure
    from mixhead.tasks.image_classification.evaluate import load_classifier

    network, processor, names = load_classifier(model)
    images = renumbered(open_images(data, "test"), names)
    if out is not None:
        check_new_folder(out, overwrite=True)
        pyplot()  # before the work, where it is missing
    layer = None if layer is None else layer_named(layer, list(routers_by_layer(network)))
    check_classes(classes or (), images)
    autocast = autocast_dtype(dtype)
    with progress_bar("Classifying") as on_progress:
        result = measure(network, processor, images, batch_size, autocast=autocast, on_progress=on_progress)
    console.print(accuracy_table(result, str(model)))
    console.print(class_table(result))
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "results.json", result.to_json() + "\n")
    write_confusion(result, out / "confusion.csv")
    plot_confusion(result, out / "confusion.png")
    if any(competes_H.any() for competes_H in result.competes.values()):
        plot_load(result, out / "load.png", classes or (), layer)
    console.print(f"Written to {out}.", markup=False, highlight=False)
