"""What a training run shows and writes down: a bar, a CSV file, TensorBoard."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mixhead.errors import MixheadError, first_line
from mixhead.files import write_text

logger = logging.getLogger(__name__)
_SAY_EVERY = 60.0  # seconds between two log lines where there is no terminal


class StepLog:
    """One row for every optimizer step, in a CSV file and, where the package is installed, for TensorBoard.

    A run that continues at step `steps` keeps the rows up to there and drops what was written after the checkpoint.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], steps: int) -> None:
        rows = [row for row in read_rows(path) if int(row["step"]) <= steps]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())
        self.seconds = _seconds(rows[-1]) if rows else 0.0
        self._columns = columns
        self._file = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")
        self._board = _tensorboard(path.parent / "tensorboard", steps)

    def write(self, row: dict[str, float | int | None]) -> None:
        """Appends a row; what is None stays empty."""
        self._writer.writerow({name: _number(row.get(name)) for name in self._columns})
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name not in ("step", "seconds") and value is not None:
                    self._board.add_scalar(f"train/{name}", value, row["step"])

    def close(self) -> None:
        """Closes the files; a full disk has been told by then."""
        with contextlib.suppress(OSError):
            self._file.close()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()


def read_rows(path: Path) -> list[dict[str, str]]:
    """The complete rows of a log; a last line that a killed process left half-written is no row.

    Raises:
        MixheadError: where the file is no log.
    """
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        rows = [*csv.DictReader(lines)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MixheadError(
            f"{path} cannot be read as a log ({first_line(error)}): move it away, and the run goes on with a new one."
        ) from error
    return [row for row in rows if re.fullmatch("[0-9]+", row.get("step") or "") and None not in row.values()]


def last_tenth(path: Path) -> list[dict[str, str]]:
    """The rows of the last tenth of a log's steps, at least one."""
    rows = read_rows(path)
    return rows[-max(len(rows) // 10, 1) :]


def _seconds(row: Mapping[str, str]) -> float:
    try:
        return float(row["seconds"])
    except (KeyError, ValueError):
        return 0.0


def _number(value: float | int | None) -> str | int:
    """A float with enough digits to come back exactly as float32."""
    if value is None:
        return ""
    return value if isinstance(value, int) else f"{value:.9g}"


def _tensorboard(folder: Path, steps: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("The package tensorboard is not installed, so the run is logged to a CSV file only.")
        return None
    return SummaryWriter(str(folder), purge_step=steps + 1, flush_secs=30)


class ProgressBar:
    """Steps, tokens per second and time left on standard error; without a terminal, a log line a minute."""

    def __init__(self, title: str, steps: int, done: int, unit: str, enabled: bool) -> None:
        console = Console(stderr=True)
        self._title, self._steps, self._unit = title, steps, unit
        self._start = self._said = time.monotonic()
        self._first = done
        self._bar: Progress | None = None
        self._enabled = enabled
        if enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn(title),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn(
                    "step {task.completed}/{task.total}, loss {task.fields[loss]}, {task.fields[speed]} " + f"{unit}/s"
                ),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
                speed_estimate_period=300.0,
            )
            self._task = self._bar.add_task("", total=steps, completed=done, loss="-", speed="-")

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float, units_per_step: int) -> None:
        """After an optimizer step."""
        now = time.monotonic()
        per_step = (now - self._start) / max(step - self._first, 1)
        speed = units_per_step / max(per_step, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=f"{loss:.3f}", speed=f"{speed:,.0f}")
        elif self._enabled and now - self._said >= _SAY_EVERY:
            self._said = now
            left = per_step * (self._steps - step) / 60
            logger.info(
                "%s: step %d of %d, loss %.3f, %.0f %s/s, %.0f min left.",
                *(self._title, step, self._steps, loss, speed, self._unit, left),
            )
