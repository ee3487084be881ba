"""`mixhead fill-mask`: what a masked language model puts into gaps."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from mixhead.cli.common import console


def fill_mask_verb(
    model: Annotated[str, typer.Argument(help="Folder of a trained masked language model.")],
    text: Annotated[str, typer.Argument(help="A text with <mask> where a word is sought.")],
    guesses: Annotated[int, typer.Option(min=1, help="How many words for each gap.")] = 5,
) -> None:
    """Prints the likeliest words for every gap in a text."""
    from mixhead.tasks.masked_lm.train import fill_mask, load_masked_lm

    network, tokenizer = load_masked_lm(model)
    table = Table("gap", "word", "probability", box=None)
    for gap, words in enumerate(fill_mask(network, tokenizer, text, guesses), 1):
        for word, probability in words:
            table.add_row(str(gap), repr(word), f"{probability:.1%}")
    console.print(table)
