"""`mixhead generate`: text from a model, and how many heads it used for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixhead.cli.common import MODEL_HELP, console, model_folder
from mixhead.errors import MixheadError

PROMPT = "The state of the Union is"
NEW_TOKENS = 80


def generate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    prompt: Annotated[str | None, typer.Option(help=f"The text to continue; by default {PROMPT!r}.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 text file to continue instead.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"How many tokens to write, at most; by default {NEW_TOKENS}, or what there is room for."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling (with a temperature above 0).")] = 0,
) -> None:
    """Continues a text with a dense or converted model and prints the share of heads that it used."""
    from mixhead import store
    from mixhead.data.text import read_text_file
    from mixhead.data.windows import prompt_ids
    from mixhead.inspect.continuing import write_on

    if prompt is not None and prompt_file is not None:
        raise MixheadError("Give one of a prompt (--prompt) and a file that holds one (--prompt-file).")
    text = read_text_file(prompt_file) if prompt_file is not None else PROMPT if prompt is None else prompt
    network, tokenizer = store.load_causal_lm(model_folder(model))
    inputs, new_tokens = prompt_ids(network, tokenizer, text, max_new_tokens, NEW_TOKENS)
    used = write_on(network, tokenizer, inputs, new_tokens, temperature, seed)
    if used:
        console.print(f"\n{used}", style="dim")
