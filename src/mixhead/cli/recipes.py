"""`mixhead recipes`: lists the recipes that come with mixhead, and copies one to change it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from mixhead.cli.common import console
from mixhead.errors import MixheadError

app = typer.Typer(no_args_is_help=True)


@app.command("ls")
def ls() -> None:
    """Lists the recipes."""
    from mixhead.training.recipes import shipped_recipes, summary

    table = Table("recipe", "what it does", box=None)
    for name, path in shipped_recipes().items():
        table.add_row(name, summary(path))
    console.print(table)


@app.command("cp")
def cp(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, see `mixhead recipes ls`.")],
    target: Annotated[Path, typer.Argument(help="File to write, or a folder for it.")] = Path(),
) -> None:
    """Copies a recipe, to be changed and given to `mixhead train`."""
    from mixhead.training.recipes import recipe_file

    source = recipe_file(recipe)
    path = target / source.name if target.is_dir() else target
    if path.exists():
        raise MixheadError(f"{path} exists: give another name.")
    shutil.copyfile(source, path)
    console.print(f"Copied to {path}; `mixhead train {path}` runs it.", markup=False, highlight=False)
