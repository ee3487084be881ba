"""The typer application, and how every verb ends: 0, 2 after a user's mistake, 130 after Ctrl-C, 143 after SIGTERM."""

from __future__ import annotations

import io
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer
from rich.console import Console

from mixhead.cli import (
    bench,
    classify,
    convert,
    demo,
    doctor,
    evaluate,
    evaluate_images,
    evaluate_samples,
    fetch,
    fill_mask,
    generate,
    inspect,
    play,
    recipes,
    sample,
    train,
    translate,
    tune,
)
from mixhead.errors import MixheadError

app = typer.Typer(
    name="mixhead",
    help="Mixture-of-head attention: convert, tune, evaluate and run models whose heads are chosen per token.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("convert")(convert.convert)
app.command("tune")(tune.tune)
app.command("evaluate")(evaluate.evaluate)
app.command("evaluate-images")(evaluate_images.evaluate_images)
app.command("classify")(classify.classify)
app.command("generate")(generate.generate)
app.add_typer(bench.app, name="bench", help="Measure speed against dense attention, checked before it is timed.")
app.command("train")(train.train)
app.add_typer(recipes.app, name="recipes", help="The recipes that `mixhead train` runs: list and copy them.")
app.command("sample")(sample.sample)
app.command("evaluate-samples")(evaluate_samples.evaluate_samples)
app.command("fetch")(fetch.fetch)
app.command("pairs")(translate.pairs)
app.command("vocabulary")(translate.vocabulary)
app.command("translate")(translate.translate)
app.command("evaluate-translation")(translate.evaluate_translation_verb)
app.command("expert-words")(translate.expert_words_verb)
app.command("fill-mask")(fill_mask.fill_mask_verb)
app.command("inspect")(inspect.inspect)
app.command("play")(play.play)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code; a user's mistake is printed as its sentence, without a traceback."""
    show_what_can_be_shown()
    try:
        with log_on_standard_error(), sigterm_ends_in_order():
            app(list(arguments), prog_name="mixhead")
    except MixheadError as error:
        return refuse(str(error))
    except UnicodeEncodeError as error:  # a name or an option of bytes that are no UTF-8
        return refuse(f"{error.object[:80]!r} holds bytes that are no UTF-8 text: give it in UTF-8.")
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        return refuse(f"{error.strerror or error}{place}.")
    except KeyboardInterrupt:
        return 130
    except SystemExit as finished:
        # typer ends every command this way, also after it has explained a wrong option (code 2) or Ctrl-C (130).
        return finished.code if isinstance(finished.code, int) else int(finished.code is not None)
    return 0


def show_what_can_be_shown() -> None:
    """On a terminal that is not UTF-8, signs that it lacks become question marks instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def log_on_standard_error() -> Iterator[None]:
    """What the library says beside its results, a line each."""
    logger = logging.getLogger("mixhead")
    level = logger.level
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogLine())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


@contextmanager
def sigterm_ends_in_order() -> Iterator[None]:
    """SIGTERM ends the command as an error does, so that nothing half-written stays; the default would kill it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class LogLine(logging.Formatter):
    """The message; a warning says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}"


def refuse(sentence: str) -> int:
    """Prints why nothing was done; markup in names that users give is left as it is."""
    console = Console(stderr=True)
    console.print("[red]error:[/red]", end=" ")
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    return 2
