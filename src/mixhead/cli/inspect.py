"""`mixhead inspect`: shows which heads each token used, as a page, in the terminal or as a figure."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixhead.cli.common import MODEL_HELP, OVERWRITE_HELP, TEXT_HELP, check_new, console, model_folder
from mixhead.errors import MixheadError

TOKENS = 1000
PAGE = Path("heads.html")

if TYPE_CHECKING:
    from torch import nn

    from mixhead.recording import Recording


def inspect(
    source: Annotated[str, typer.Argument(help="A recording that was saved, or a model. " + MODEL_HELP)],
    out: Annotated[Path | None, typer.Option(help=f"The page to write; {PAGE} if nothing else is asked for.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to read (or, by a translation model, to translate), or NAME=text; several are compared with "
            "each other. " + TEXT_HELP
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="A prompt to continue instead.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="A picture, or a folder of pictures; its subfolders are classes.")
    ] = None,
    draw: Annotated[
        int | None,
        typer.Option(min=1, help="Let an image generator draw so many images, of one class after the other."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Tokens to read of each text, or to write; by default {TOKENS}.")
    ] = None,
    shown: Annotated[int, typer.Option(min=1, help="Tokens that are shown one by one.")] = 10_000,
    terminal: Annotated[bool, typer.Option("--terminal", help="Show it here.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="A figure to write (.png, .svg, .pdf): the map of loads, or loads --by.")
    ] = None,
    figure: Annotated[str | None, typer.Option(help="The figure: loads or groups; groups with --by.")] = None,
    by: Annotated[
        str | None, typer.Option(help="What the figure compares: text, class, position, word class, time_step, …")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Layer of the figure and of the terminal's tokens.")] = None,
    save: Annotated[Path | None, typer.Option(help="Keep the recording under this name (.safetensors, .json).")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE_HELP)] = False,
) -> None:
    """Records which heads the tokens of texts or pictures use, and shows it; or shows what was recorded before."""
    from mixhead.recording.names import layer_named
    from mixhead.report.contents import read_contents
    from mixhead.report.html import write_html
    from mixhead.report.plots import plot as draw_figure
    from mixhead.report.terminal import terminal_view

    page = out or (None if terminal or plot else PAGE)
    check_targets(page, plot, figure, save, overwrite=overwrite)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording" if save is None else save
        recorded = read_or_record(source, Inputs(text, prompt, images, draw, tokens, layer, by), path)
        contents = read_contents(recorded.recording, shown)
    layer = None if layer is None else layer_named(layer, contents.recording.layers)
    if terminal:
        console.print(terminal_view(contents, layer))
    if plot is not None:
        draw_figure(contents, plot, figure, by, layer)
        console.print(f"Wrote {plot}.", markup=False, highlight=False)
    if page is not None:
        title = f"Which heads {model_name(source)} uses" if title is None else title
        written = write_html(contents, page, title=title, pictures=recorded.pictures)
        size = f"{written.stat().st_size / 1e6:.1f} MB"
        console.print(f"Wrote {written} ({size}): open it in a browser.", markup=False, highlight=False)


def check_targets(
    page: Path | None, plot: Path | None, figure: str | None, save: Path | None, *, overwrite: bool
) -> None:
    """Raises where something stands already that shall be written, or could not be written."""
    from mixhead.recording.file import checked_path, recording_exists
    from mixhead.report.plots import check_figure

    if plot is not None:
        check_figure(plot, figure)
    for file in (page, plot):
        check_new(file, overwrite=overwrite)
    if save is not None and recording_exists(checked_path(save)) and not overwrite:
        raise MixheadError(f"There is a recording {save}: give another name, or replace it with --overwrite.")


@dataclass(frozen=True)
class Inputs:
    """What a model is to be shown, and what will be asked of the recording."""

    texts: Sequence[str] | None
    prompt: str | None
    images: Path | None
    draw: int | None
    tokens: int | None
    layer: str | None
    by: str | None

    def check(self, model: nn.Module, *labels: str) -> None:
        """Raises where nothing would be recorded, not that layer, or tokens with none of these labels.

        A model whose parts say more of their tokens may have others.
        """
        from mixhead.recording.listen import routers_by_layer
        from mixhead.recording.names import layer_named

        layers = list(routers_by_layer(model))
        if not layers:
            raise MixheadError("This model routes in no layer: convert it first (mixhead convert).")
        if self.layer is not None:
            layer_named(self.layer, layers)
        says_more = any(hasattr(module, "routing_labels") for module in model.modules())
        if self.by is not None and self.by not in labels and not says_more:
            raise MixheadError(
                f"The tokens are not grouped by {self.by!r}; they are by {', '.join(labels) or 'nothing'}."
            )


@dataclass(frozen=True)
class Recorded:
    """A recording, and the pictures that it is about."""

    recording: Recording
    pictures: Sequence[bytes] = ()


def read_or_record(source: str, inputs: Inputs, path: Path) -> Recorded:
    """The recording of that name, or a new one of the model of that name."""
    from mixhead import store
    from mixhead.inspect.record import (
        picture_files,
        record_drawing,
        record_pictures,
        record_texts,
        record_translation,
        record_writing,
    )
    from mixhead.recording import Recording
    from mixhead.recording.file import recording_exists
    from mixhead.tasks.image_classification.evaluate import load_processor
    from mixhead.tasks.image_generation.sampling import class_names, load_pipeline
    from mixhead.tasks.translation.translate import load_translator

    given = [name for name in ("texts", "prompt", "images", "draw") if getattr(inputs, name) is not None]
    if recording_exists(source):
        if given:
            raise MixheadError(f"{source} is a recording, which is shown as it is: leave out the texts or pictures.")
        return Recorded(Recording(source))
    if len(given) > 1:
        raise MixheadError("Give one of texts (--text), a prompt (--prompt), pictures (--images) and --draw.")
    folder = model_folder(source)
    about = {"model": model_name(source)}
    if inputs.images is not None:
        network = store.load(folder)
        processor = load_processor(folder, network)
        pictures = picture_files(inputs.images)
        inputs.check(network, *(["class"] if any(pictures.values()) else []))
        return Recorded(*record_pictures(network, processor, pictures, path, about=about))
    if inputs.draw is not None:
        pipeline = load_pipeline(folder)
        count = len(class_names(pipeline))
        classes = [number % count for number in range(inputs.draw)]
        inputs.check(pipeline.transformer.dit)
        return Recorded(*record_drawing(pipeline, classes, path, about=about))
    named = dict(name_and_text(text) for text in inputs.texts or ["addresses:test"])
    labels = (*(["text"] if len(named) > 1 else []), "word class", "part of speech", "position")
    if store.load_config(store.check_folder(folder)).is_encoder_decoder:
        if inputs.prompt is not None:
            raise MixheadError(f"{folder} translates and continues no prompt: give it a text (--text).")
        translator = load_translator(folder)
        inputs.check(translator[0], *labels)
        return Recorded(record_translation(*translator, named, path, most_tokens=inputs.tokens or TOKENS, about=about))
    model, tokenizer = (store.load_text_model if inputs.prompt is None else store.load_causal_lm)(folder)
    inputs.check(model, *labels)
    if inputs.prompt is not None:
        written = record_writing(model, tokenizer, inputs.prompt, path, new_tokens=inputs.tokens, about=about)
        return Recorded(written)
    return Recorded(record_texts(model, tokenizer, named, path, most_tokens=inputs.tokens or TOKENS, about=about))


def model_name(source: str) -> str:
    """What a model or a recording is called; the folder `model` of a training run is called like the run."""
    path = Path(source).resolve()
    return path.parent.name if path.name == "model" else path.name


def name_and_text(given: str) -> tuple[str, list[str]]:
    """`NAME=text`, or a text that is named by itself."""
    from mixhead.data.text import text_source

    name, equals, text = given.partition("=")
    return name, text_source(text if equals else given, "test")
