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

    from mixhead.data.windows import Windows
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
    from mixhead.data.text import text_source
    from mixhead.files import write_text
    from mixhead.precision import autocast_dtype
    from mixhead.tasks.language_modelling.comparison_table import Comparison
    from mixhead.tasks.language_modelling.lm_eval_tasks import require_lm_eval, write_tasks

    check_new(json_file, overwrite=True)
    autocast = autocast_dtype(dtype)
    documents = text_source(text, "test")
    with tempfile.TemporaryDirectory() as questions:
        if tasks:
            require_lm_eval()
            write_tasks(questions, documents, items=tasks)
        rows: list[Row] = []
        for name, (folder, windows) in zip(models, read_by(models, documents, window, tokens), strict=True):
            row = measured(name, folder, windows, Path(questions) if tasks else None, autocast)
            rows.append(replace(row, original=not rows))
    predicted = ", ".join(dict.fromkeys(f"{row.perplexity.tokens:,}" for row in rows))
    note = f"{text}, {predicted} predicted tokens in windows of {windows.ids_WT.shape[1]}, {autocast or 'own dtype'}"
    table = Comparison("Perplexity on held-out text", tuple(rows), (note,))
    console.print(table.to_rich())
    if json_file is not None:
        write_text(json_file, table.to_json())


def read_by(
    models: Sequence[str], documents: Sequence[str], window: int | None, tokens: int
) -> list[tuple[Path, Windows]]:
    """The folder of each model, and the text as its own tokenizer cuts it; all are looked at before one is run."""
    from mixhead import store
    from mixhead.models.context import check_ids, window_for

    folders = [model_folder(name) for name in models]
    outlines = [store.outline(folder) for folder in folders]
    length = window_for(outlines, window, WINDOW)
    cut = [windows_of(store.load_tokenizer(folder), documents, length, tokens) for folder in folders]
    for outline, windows in zip(outlines, cut, strict=True):
        check_ids(outline, windows.ids_WT)
    return list(zip(folders, cut, strict=True))


def measured(name: str, folder: Path, windows: Windows, questions: Path | None, autocast: torch.dtype | None) -> Row:
    """The row of one model."""
    from mixhead import store
    from mixhead.tasks.language_modelling.comparison_table import Row
    from mixhead.tasks.language_modelling.evaluate import heads_of, perplexity
    from mixhead.tasks.language_modelling.lm_eval_tasks import evaluate_tasks

    network, tokenizer = store.load_causal_lm(folder)
    start = time.perf_counter()
    with progress_bar(f"Perplexity of {name}") as on_progress:
        found = perplexity(network, windows, autocast=autocast, on_progress=on_progress)
    cloze = choice = None
    if questions is not None:
        with progress_bar(f"Questions for {name}") as on_progress:
            scores = evaluate_tasks(network, tokenizer, questions, autocast=autocast, on_progress=on_progress)
        cloze, choice = scores.cloze, scores.choice
    return Row(name, *heads_of(network), None, found, cloze, choice, time.perf_counter() - start)
