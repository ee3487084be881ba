"""`mixhead inspect`: shows which heads each token used, as a page, in the terminal or as a figure."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixhead.cli.common import MODEL_HELP, TEXT_HELP, console, model_folder
from mixhead.errors import MixheadError

if TYPE_CHECKING:
    from mixhead.recording import Recording
    from mixhead.report.contents import Contents


def inspect(
    source: Annotated[str, typer.Argument(help="A recording that was saved, or a model. " + MODEL_HELP)],
    out: Annotated[
        Path | None, typer.Option(help="The page to write; heads.html if nothing else is asked for.")
    ] = None,
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
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to read of each text, or to write.")] = 1000,
    shown: Annotated[int, typer.Option(min=1, help="Tokens that are shown one by one.")] = 10_000,
    terminal: Annotated[bool, typer.Option("--terminal", help="Show it here.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="A figure to write (.png, .svg, .pdf): the map of loads, or loads --by.")
    ] = None,
    figure: Annotated[
        str | None, typer.Option(help="Which figure: loads, groups; groups with --by, else loads.")
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="What the figure compares: text, class, position, word class, time_step, …")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Layer of the figure and of the terminal's tokens.")] = None,
    save: Annotated[Path | None, typer.Option(help="Keep the recording under this name (.safetensors, .json).")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
) -> None:
    """Records which heads the tokens of texts or pictures use, and shows it; or shows what was recorded before."""
    from mixhead.report.contents import read_contents
    from mixhead.report.html import write_html
    from mixhead.report.plots import plot as draw_figure
    from mixhead.report.terminal import terminal_view

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording" if save is None else save
        recorded = read_or_record(source, Inputs(text, prompt, images, draw, tokens), path)
        contents = read_contents(recorded.recording, shown)
    if layer is not None:
        layer = named_layer(contents, layer)
    if terminal:
        console.print(terminal_view(contents, layer))
    if plot is not None:
        draw_figure(contents, plot, figure, by, layer)
        console.print(f"Wrote {plot}.", markup=False, highlight=False)
    if out is not None or not (terminal or plot):
        heading = f"Which heads {model_name(source)} uses" if title is None else title
        written = write_html(contents, out or Path("heads.html"), title=heading, pictures=recorded.pictures)
        size = written.stat().st_size / 1e6
        console.print(f"Wrote {written} ({size:.1f} MB): open it in a browser.", markup=False, highlight=False)


@dataclass(frozen=True)
class Inputs:
    """What a model is to be shown."""

    texts: Sequence[str] | None
    prompt: str | None
    images: Path | None
    draw: int | None
    tokens: int


@dataclass(frozen=True)
class Recorded:
    """A recording, and the pictures that it is about."""

    recording: Recording
    pictures: Sequence[bytes] = ()


def read_or_record(source: str, inputs: Inputs, path: Path) -> Recorded:
    """The recording of that name, or a new one of the model of that name."""
    from transformers import AutoImageProcessor

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
        try:
            processor = AutoImageProcessor.from_pretrained(folder)
        except (OSError, ValueError, ImportError) as error:
            raise MixheadError(f"{folder} has no image processor that can be loaded ({error}).") from error
        return Recorded(*record_pictures(network, processor, picture_files(inputs.images), path, about=about))
    if inputs.draw is not None:
        pipeline = load_pipeline(folder)
        count = len(class_names(pipeline))
        classes = [number % count for number in range(inputs.draw)]
        return Recorded(*record_drawing(pipeline, classes, path, about=about))
    named = dict(name_and_text(text) for text in inputs.texts or ["addresses:test"])
    if store.load_config(store.check_folder(folder)).is_encoder_decoder:
        if inputs.prompt is not None:
            raise MixheadError(f"{folder} translates and continues no prompt: give it a text (--text).")
        translator = load_translator(folder)
        return Recorded(record_translation(*translator, named, path, most_tokens=inputs.tokens, about=about))
    model, tokenizer = store.load_causal_lm(folder)
    if inputs.prompt is not None:
        written = record_writing(model, tokenizer, inputs.prompt, path, new_tokens=inputs.tokens, about=about)
        return Recorded(written)
    return Recorded(record_texts(model, tokenizer, named, path, most_tokens=inputs.tokens, about=about))


def model_name(source: str) -> str:
    """What a model or a recording is called; the folder `model` of a training run is called like the run."""
    path = Path(source).resolve()
    return path.parent.name if path.name == "model" else path.name


def name_and_text(given: str) -> tuple[str, list[str]]:
    """`NAME=text`, or a text that is named by itself."""
    from mixhead.data.text import text_source

    name, equals, text = given.partition("=")
    return name, text_source(text if equals else given, "test")


def named_layer(contents: Contents, name: str) -> str:
    """The layer of that name, long or short.

    Raises:
        MixheadError: where there is none.
    """
    from mixhead.recording.names import short_names

    layers = contents.recording.layers
    known = {**{layer: layer for layer in layers}, **dict(zip(short_names(layers), layers, strict=True))}
    if name not in known:
        raise MixheadError(f"No layer {name!r} routes: choose one of {', '.join(short_names(layers))}.")
    return known[name]
