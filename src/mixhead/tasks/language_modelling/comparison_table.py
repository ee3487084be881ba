"""The table in which models are compared: originals, the published recipe, ours."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixhead.errors import MixheadError
from mixhead.tasks.language_modelling.evaluate import Accuracy, Perplexity, ratio_band

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True)
class Row:
    """One model in a comparison.

    Attributes:
        name: what the model is, for example "original" or "mixhead, calibrated and tuned".
        active_heads: heads that a token uses, the mean over layers; may be broken.
        heads: heads of a layer; 0, as active_heads, where the model has none.
        tuning_tokens: tokens that it was tuned on, 0 if it was not; None where nobody knows, as of a model that was
            found in a folder.
        perplexity: on held-out text.
        cloze: accuracy at the last word of a sentence; None if not measured.
        choice: accuracy at choosing the true continuation among four; None if not measured.
        seconds: wall time to make this row: calibration, tuning and evaluation.
        original: whether this is the original model (tuned or not), the measure of the other rows.
    """

    name: str
    active_heads: float
    heads: int
    tuning_tokens: int | None
    perplexity: Perplexity
    cloze: Accuracy | None = None
    choice: Accuracy | None = None
    seconds: float = 0.0
    original: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.active_heads <= self.heads or self.active_heads == self.heads == 0):
            raise MixheadError(
                f"The row {self.name!r} states {self.active_heads:g} active heads of {self.heads}; "
                f"give a number above 0 and at most {self.heads}."
            )
        if (self.tuning_tokens or 0) < 0 or self.seconds < 0:
            raise MixheadError(f"The row {self.name!r} states a negative number of tuning tokens or seconds.")

    @property
    def heads_active(self) -> str:
        """For example "7 of 9 (77.8%)"."""
        if self.heads == 0:
            return "—"
        active = f"{self.active_heads:.2f}".rstrip("0").rstrip(".")
        return f"{active} of {self.heads} ({100 * self.active_heads / self.heads:.1f}%)"


@dataclass(frozen=True)
class Comparison:
    """The comparison that is always the same: originals, the published recipe, ours.

    What stands in brackets behind a figure is its 95% band; that of a ratio is over windows of the same text.

    Attributes:
        title: what is compared, on which text.
        rows: one a model. The ratio of a row is to the row of the original with as many tuning tokens; where nobody
            knows how long the models were tuned, to that of the first original, whatever was done to it.
        notes: lines below the table: windows, data, machine, the command that makes the table again.
    """

    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def knows_tuning(self) -> bool:
        """Whether it is known of all models how long they were tuned."""
        return all(row.tuning_tokens is not None for row in self.rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """The headings."""
        tuning = ("tuning tokens",) if self.knows_tuning else ()
        ratio = "x original, same tokens" if self.knows_tuning else "x first model"
        bits = () if self.same_windows else ("bits per byte",)
        return ("model", "heads active", *tuning, "perplexity", *bits, ratio, "cloze", "choice of 4", "wall time")

    @property
    def same_windows(self) -> bool:
        """Whether all models were given the same windows; perplexities of other tokenizers cannot be compared."""
        return len({row.perplexity.windows for row in self.rows}) <= 1

    def base_of(self, row: Row) -> Row | None:
        """The original tuned on the same number of tokens, or None where the table has none on the same windows."""
        originals = [other for other in self.rows if other.original]
        if self.knows_tuning:
            originals = [other for other in originals if other.tuning_tokens == row.tuning_tokens]
        base = next(iter(originals), None)
        return base if base is not None and base.perplexity.windows == row.perplexity.windows else None

    def ratio(self, row: Row) -> float | None:
        """The row's perplexity over that of the original tuned on the same tokens; None where there is none."""
        base = self.base_of(row)
        return None if base is None else math.exp(row.perplexity.mean_nll - base.perplexity.mean_nll)

    def ratio_text(self, row: Row) -> str:
        """The ratio with its 95% band, where the windows are known."""
        base, ratio = self.base_of(row), self.ratio(row)
        if base is None or ratio is None:
            return "—"
        windows = len(row.perplexity.window_nll)
        if base is row or windows < 2 or windows != len(base.perplexity.window_nll):
            return f"{ratio:.3f}"
        low, high = ratio_band(row.perplexity, base.perplexity)
        return f"{ratio:.3f} ({low:.3f}–{high:.3f})"

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text, one tuple a row, in the order of `columns`."""
        return [
            (
                row.name,
                row.heads_active,
                *((f"{row.tuning_tokens:,}",) if self.knows_tuning else ()),
                f"{row.perplexity.perplexity:.2f}",
                *(() if self.same_windows else (f"{row.perplexity.bits_per_byte:.3f}",)),
                self.ratio_text(row),
                "—" if row.cloze is None else str(row.cloze),
                "—" if row.choice is None else str(row.choice),
                _duration(row.seconds),
            )
            for row in self.rows
        ]

    def to_markdown(self) -> str:
        """The table with its title and notes in Markdown."""
        lines = [self.columns, ("---", *("---:" for _ in self.columns[1:])), *self.cells()]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        notes = "".join(f"\n- {note}" for note in self.notes)
        return f"### {self.title}\n\n{table}\n" + (f"{notes}\n" if notes else "")

    def to_json(self) -> str:
        """Everything that was measured, unrounded, with perplexity and ratio spelled out in each row."""
        rows = [
            {
                **dataclasses.asdict(row),
                "perplexity_value": row.perplexity.perplexity,
                "bits_per_byte": row.perplexity.bits_per_byte if row.perplexity.bytes else None,
                "ratio": self.ratio(row),
            }
            for row in self.rows
        ]
        return json.dumps({"title": self.title, "rows": rows, "notes": list(self.notes)}, indent=2) + "\n"

    def to_rich(self) -> rich.table.Table:
        """The table for a terminal."""
        import rich.table  # only terminals need it

        table = rich.table.Table(title=self.title, caption="\n".join(self.notes) or None)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row, cells in zip(self.rows, self.cells(), strict=True):
            table.add_row(*cells, style="dim" if row.original else None)
        return table


def _duration(seconds: float) -> str:
    """For example "8.3 s", "2 min 05 s" or "1 h 04 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
