"""`mixhead evaluate`: perplexity and offline tasks of one or several models, as one table."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixhead.cli.common import DTYPE_HELP, MODEL_HELP, TEXT_HELP, console, model_folder, progress_bar, windows_of

if TYPE_CHECKING:
    from torch import Tensor

    from mixhead.tasks.language_modelling.comparison_table import Row


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Models, the original first. " + MODEL_HELP)],
    text: Annotated[str, typer.Option(help="Held-out text. " + TEXT_HELP)] = "addresses:test",
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to measure the perplexity on.")] = 16_384,
    tasks: Annotated[int, typer.Option(min=0, help="Questions of each lm-eval task; 0 leaves them out.")] = 0,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
) -> None:
    """Measures models on the same held-out text and prints perplexities beside the first model's."""
    from mixhead import store
    from mixhead.data.text import text_source
    from mixhead.precision import autocast_dtype
    from mixhead.tasks.language_modelling.comparison_table import Comparison, Row
    from mixhead.tasks.language_modelling.evaluate import heads_of, perplexity
    from mixhead.tasks.language_modelling.lm_eval_tasks import evaluate_tasks, write_tasks

    autocast = autocast_dtype(dtype)
    rows: list[Row] = []
    windows_WT: Tensor | None = None
    for name in models:
        network, tokenizer = store.load_causal_lm(model_folder(name))
        if windows_WT is None:
            windows_WT = windows_of(tokenizer, text, "test", window, tokens)
        start = time.perf_counter()
        with progress_bar(f"Perplexity of {name}") as on_progress:
            measured = perplexity(network, windows_WT, autocast=autocast, on_progress=on_progress)
        cloze = choice = None
        if tasks:
            with tempfile.TemporaryDirectory() as folder, progress_bar(f"Questions for {name}") as on_progress:
                write_tasks(folder, text_source(text, "test"), items=tasks)
                scores = evaluate_tasks(network, tokenizer, folder, autocast=autocast, on_progress=on_progress)
            cloze, choice = scores.cloze, scores.choice
        active, heads = heads_of(network)
        seconds = time.perf_counter() - start
        rows.append(Row(name, active, heads, None, measured, cloze, choice, seconds, original=not rows))
    note = f"{text}, {rows[0].perplexity.tokens:,} predicted tokens in windows of {window}, {autocast or 'own dtype'}"
    table = Comparison("Perplexity on held-out text", tuple(rows), (note,))
    console.print(table.to_rich())
    if json_file is not None:
        json_file.write_text(table.to_json(), encoding="utf-8")
