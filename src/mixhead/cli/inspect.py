"""`mixhead inspect`: shows which heads each token used, as a page, in the terminal or as a figure."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from mixhead.cli.common import MODEL_HELP, OVERWRITE_HELP, TEXT_HELP, check_new, console, model_folder
from mixhead.errors import MixheadError
from mixhead.inspect import TOKENS

PAGE = Path("heads.html")


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
    from mixhead.inspect.sources import Inputs, model_name, read_or_record
    from mixhead.recording.names import layer_named
    from mixhead.report.contents import read_contents
    from mixhead.report.html import write_html
    from mixhead.report.plots import plot as draw_figure
    from mixhead.report.terminal import terminal_view

    page = out or (None if terminal or plot else PAGE)
    check_targets(page, plot, figure, save, overwrite=overwrite)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording" if save is None else save
        recorded = read_or_record(source, Inputs(text, prompt, images, draw, tokens, layer, by), path, model_folder)
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
    elif figure is not None:
        raise MixheadError(f"The figure {figure!r} needs a file to be written to: give --plot FILE too.")
    for file in (page, plot):
        check_new(file, overwrite=overwrite)
    if save is not None and recording_exists(checked_path(save)) and not overwrite:
        raise MixheadError(f"There is a recording {save}: give another name, or replace it with --overwrite.")
