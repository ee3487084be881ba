"""`mixhead train`: runs a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from mixhead.cli.common import console


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe of `mixhead recipes ls`, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Values of the recipe to replace: key=value or part.key=value.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Folder of the run; runs/RECIPE by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
) -> None:
    """Trains what a recipe describes; Ctrl-C leaves a run that --resume continues."""
    from mixhead.report.plots import plot_health
    from mixhead.tasks.registry import train_recipe
    from mixhead.training.recipes import read_recipe
    from mixhead.training.run import LOG, run_folder

    read = read_recipe(recipe, overrides or ())
    folder = run_folder(recipe, resume) if run is None else run
    result = train_recipe(read, folder, resume=resume)
    if os.environ.get("RANK", "0") != "0":
        return  # one of several processes that torchrun started: the first one reports
    table = Table("measure", "value", box=None)
    for name, value in result.metrics.items():
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    picture = plot_health(folder / LOG)
    drawn = f", the health of its routing in {picture}" if picture else ""
    console.print(f"The model is in {result.folder}{drawn}.", markup=False, highlight=False)
