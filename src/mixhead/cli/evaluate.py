"""`mixhead evaluate`: perplexity and offline tasks of one or several models, as one table."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixhead.cli.common import (
    DTYPE_HELP,
    MODEL_HELP,
    TEXT_HELP,
    WINDOW_HELP,
    check_new,
    console,
    model_folder,
    progress_bar,
    windows_of,
)
from mixhead.tasks.language_modelling.config import WINDOW

if TYPE_CHECKING:
    import torch

    from mixhead.tasks.language_modelling.comparison_table import Row


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Models, the original first. " + MODEL_HELP)],
    text: Annotated[str, typer.Option(help="Held-out text. " + TEXT_HELP)] = "addresses:test",
    window: Annotated[int | None, typer.Option(min=2, help=WINDOW_HELP)] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to measure the perplexity on.")] = 16_384,
    tasks: Annotated[int, typer.Option(min=0, help="Questions of each lm-eval task; 0 leaves them out.")] = 0,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
) -> None:
    """Measures models on the same held-out text and prints perplexities beside the first model's; where models have
    different tokenizers, bits per byte too, which can be compared.
    """
    from mixhead import store
    from mixhead.data.text import text_source
    from mixhead.files import write_text
    from mixhead.models.context import window_for
    from mixhead.precision import autocast_dtype
    from mixhead.tasks.language_modelling.comparison_table import Comparison
    from mixhead.tasks.language_modelling.lm_eval_tasks import require_lm_eval

    check_new(json_file, overwrite=True)
    if tasks:
        require_lm_eval()
    autocast = autocast_dtype(dtype)
    documents = text_source(text, "test")
    folders = [model_folder(name) for name in models]
    window = window_for([store.outline(folder) for folder in folders], window, WINDOW)
    rows: list[Row] = []
    for name, folder in zip(models, folders, strict=True):
        rows.append(measured(name, folder, documents, (window, tokens), tasks, autocast))
        rows[-1] = replace(rows[-1], original=len(rows) == 1)
    predicted = ", ".join(dict.fromkeys(f"{row.perplexity.tokens:,}" for row in rows))
    note = f"{text}, {predicted} predicted tokens in windows of {window}, {autocast or 'own dtype'}"
    table = Comparison("Perplexity on held-out text", tuple(rows), (note,))
    console.print(table.to_rich())
    if json_file is not None:
        write_text(json_file, table.to_json())


def measured(
    name: str,
    folder: Path,
    documents: Sequence[str],
    size: tuple[int, int],
    tasks: int,
    autocast: torch.dtype | None,
) -> Row:
    """The row of one model: its own tokens, windows of `size[0]` of them, `size[1]` in all."""
    from mixhead import store
    from mixhead.tasks.language_modelling.comparison_table import Row
    from mixhead.tasks.language_modelling.evaluate import heads_of, perplexity
    from mixhead.tasks.language_modelling.lm_eval_tasks import evaluate_tasks, write_tasks

    network, tokenizer = store.load_causal_lm(folder)
    windows = windows_of(tokenizer, documents, *size)
    start = time.perf_counter()
    with progress_bar(f"Perplexity of {name}") as on_progress:
        found = perplexity(network, windows, autocast=autocast, on_progress=on_progress)
    cloze = choice = None
    if tasks:
        with tempfile.TemporaryDirectory() as questions, progress_bar(f"Questions for {name}") as on_progress:
            write_tasks(questions, documents, items=tasks)
            scores = evaluate_tasks(network, tokenizer, questions, autocast=autocast, on_progress=on_progress)
        cloze, choice = scores.cloze, scores.choice
    return Row(name, *heads_of(network), None, found, cloze, choice, time.perf_counter() - start)
