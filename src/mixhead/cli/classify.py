"""`mixhead classify`: what is on an image, and which heads its patches used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from mixhead.cli.common import check_new_folder, console
from mixhead.errors import MixheadError

if TYPE_CHECKING:
    from mixhead.tasks.image_classification.classify import Classification


def classify(
    model: Annotated[Path, typer.Argument(help="A folder with an image classifier: MoH-ViT, converted or plain.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    top: Annotated[int, typer.Option(min=1, help="How many labels to print.")] = 5,
    overlay: Annotated[
        Path | None,
        typer.Option(
            help="Folder for a picture of each image with a map of how many and which heads its patches used."
        ),
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Layer of the map; the last one whose heads compete.")] = None,
) -> None:
    """Prints the likeliest labels of images with their probabilities and the heads that were used."""
    from mixhead.recording.listen import routers_by_layer
    from mixhead.recording.names import layer_named
    from mixhead.report.comparison import pyplot
    from mixhead.report.vision import plot_heads
    from mixhead.tasks.image_classification.classify import classify as look_at
    from mixhead.tasks.image_classification.evaluate import load_classifier

    network, processor, classes = load_classifier(model)
    if overlay is not None:
        check_new_folder(overlay, overwrite=True)
        pyplot()  # before the work, where it is missing
    layer = None if layer is None else layer_named(layer, list(routers_by_layer(network)))
    refused = []
    for file in images:
        try:
            found = look_at(network, processor, file, classes, top)
        except MixheadError as error:
            refused.append(error)
            continue
        console.print(description(found))
        if overlay is not None:
            overlay.mkdir(parents=True, exist_ok=True)
            picture = overlay / picture_name(file, images)
            plot_heads(found, picture, layer)
            console.print(f"  {picture}", markup=False, highlight=False)
    if refused:  # after all that could be read: one bad file among many shall not hide the others
        raise MixheadError(" ".join(str(error) for error in refused))


def picture_name(file: Path, files: list[Path]) -> str:
    """A name for the picture of a file, with its folder and suffix where another file has the same stem."""
    alike = [other for other in files if other.stem == file.stem]
    stem = file.stem if len(alike) == 1 else "-".join(file.parts).lstrip("/-").replace(".", "-")
    return f"{stem}-heads.png"


def description(found: Classification) -> str:
    """A few lines about one image."""
    labels = zip(found.labels, found.probabilities, strict=True)
    lines = [f"[bold]{escape(found.file)}[/bold]"]
    lines += [f"  {probability:7.2%}  {escape(label)}" for label, probability in labels]
    if found.heads:
        lines += [f"  heads used: {found.used:.4g} of {found.heads} ({found.used / found.heads:.0%})"]
    return "\n".join(lines)
