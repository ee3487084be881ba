"""The typer application, and how every verb ends: 0, 2 after a user's mistake, 130 after Ctrl-C."""

from __future__ import annotations

from collections.abc import Sequence

import click
import typer
from rich.console import Console

from mixhead.cli import convert, demo, doctor, evaluate, generate, tune
from mixhead.errors import MixheadError

app = typer.Typer(
    name="mixhead",
    help="Mixture-of-head attention: convert, calibrate, tune, evaluate and run models whose heads are chosen per token.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("convert")(convert.convert)
app.command("tune")(tune.tune)
app.command("evaluate")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code; a user's mistake is printed as its sentence, without a traceback."""
    console = Console(stderr=True)
    try:
        result = app(list(arguments), standalone_mode=False)
    except (MixheadError, click.UsageError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        console.print("[red]error:[/red]", end=" ")
        console.print(message, markup=False, highlight=False)
        return 2
    except OSError as error:
        console.print("[red]error:[/red]", end=" ")
        place = f" ({error.filename})" if error.filename else ""
        console.print(f"{error.strerror or error}{place}.", markup=False, highlight=False)
        return 2
    except (KeyboardInterrupt, click.Abort):
        console.print("Stopped.")
        return 130
    return result if isinstance(result, int) else 0
