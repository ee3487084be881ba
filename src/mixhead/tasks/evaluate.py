"""Perplexity on token windows, and the table in which models are compared.

Shape legend of this file: W windows, B windows in one batch, T tokens in one window, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixhead.errors import MixheadError
from mixhead.models.hugging_face import MoHModelMixin
from mixhead.modes import autocast_to, evaluation_mode

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        mean_nll: mean negative log-likelihood of a predicted token, in nats.
        tokens: predicted tokens (each window predicts all of its tokens but the first).
        seconds: wall time of the measurement.
        window_nll: mean negative log-likelihood of each window, for paired comparisons.
    """

    mean_nll: float
    tokens: int
    seconds: float
    window_nll: tuple[float, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(mean_nll)."""
        return math.exp(min(self.mean_nll, 700.0))

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens per second of wall time."""
        return self.tokens / self.seconds if self.seconds > 0 else math.inf


@dataclass(frozen=True)
class Accuracy:
    """The share of questions answered rightly.

    Attributes:
        value: share between 0 and 1.
        stderr: standard error of `value`.
        hits: whether each question was answered rightly, in their order, for paired comparisons.
    """

    value: float
    stderr: float
    hits: tuple[bool, ...] = ()

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}% ± {100 * self.stderr:.1f}"


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows_WT: Tensor,
    batch_size: int = 4,
    *,
    autocast: torch.dtype | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measures the perplexity of a causal language model, every predicted token with the same weight.

    The model runs in evaluation mode; the mode of each of its modules is put back afterwards.

    Args:
        model: maps `input_ids` [B, T] to an output with `.logits` [B, T, V].
        windows_WT: token ids, int64 [W, T], as `token_windows` makes them.
        batch_size: windows in one forward pass; it changes speed and memory, not the result.
        autocast: a dtype such as torch.bfloat16 for the forward pass; None computes in the model's own. The loss is
            always computed in float32 and summed in float64.
        on_progress: called with (windows done, all windows).

    Raises:
        MixheadError: where the windows have the wrong shape or the model gives NaN or infinity.
    """
    if windows_WT.dim() != 2 or windows_WT.is_floating_point() or windows_WT.size(0) < 1 or windows_WT.size(1) < 2:
        raise MixheadError(
            f"windows_WT must hold token ids as integers of shape [windows, tokens], at least one window of two "
            f"tokens, but it is {windows_WT.dtype} of shape {list(windows_WT.shape)}."
        )
    if batch_size < 1:
        raise MixheadError(f"batch_size must be at least 1 window, but it is {batch_size}.")
    count, window = windows_WT.shape
    device = next(model.parameters()).device
    window_nll: list[float] = []
    start = time.perf_counter()
    with evaluation_mode(model):
        for ids_BT in windows_WT.split(batch_size):
            window_nll += _window_nll(model, ids_BT.to(device), autocast, first=len(window_nll))
            if on_progress is not None:
                on_progress(len(window_nll), count)
    seconds = time.perf_counter() - start
    return Perplexity(math.fsum(window_nll) / count, count * (window - 1), seconds, tuple(window_nll))


def _window_nll(model: nn.Module, ids_BT: Tensor, autocast: torch.dtype | None, first: int) -> list[float]:
    """Mean negative log-likelihood of each window of a batch whose first window has the number `first`."""
    with autocast_to(autocast, ids_BT.device):
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    means: list[float] = []
    for row, (ids_T, logits_TV) in enumerate(zip(ids_BT, logits_BTV, strict=True)):
        nll_T = F.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="none")  # a window at a time: V is large
        mean = nll_T.double().mean().item()
        if not math.isfinite(mean):
            raise MixheadError(
                f"The model gives {mean} as the loss of window {first + row} (counted from 0); its weights or its "
                f"hidden states hold NaN or infinity, so no perplexity can be stated."
            )
        means.append(mean)
    return means


def heads_of(model: PreTrainedModel) -> tuple[float, int]:
    """(heads that a token uses in an average layer, heads of a layer) of a language model, converted or not."""
    if isinstance(model, MoHModelMixin):
        layers = model.config.moh["layers"]
        return sum(layer["active_heads"] for layer in layers) / len(layers), layers[0]["num_heads"]
    heads = model.config.num_attention_heads
    return heads, heads


def paired_ratio(new: Perplexity, base: Perplexity) -> tuple[float, float]:
    """The ratio of two perplexities measured on the same windows, and its standard error over those windows.

    The error is that of the mean difference of the windows: far smaller than the error of either perplexity.

    Raises:
        MixheadError: where the two do not hold the same number of windows.
    """
    if len(new.window_nll) != len(base.window_nll) or not new.window_nll:
        raise MixheadError(
            f"A paired ratio needs both perplexities on the same windows, but they hold {len(new.window_nll)} and "
            f"{len(base.window_nll)} windows."
        )
    gaps = [a - b for a, b in zip(new.window_nll, base.window_nll, strict=True)]
    ratio = math.exp(statistics.fmean(gaps))
    return ratio, ratio * _stderr(gaps)


def paired_gap(new: Accuracy, base: Accuracy) -> tuple[float, float]:
    """The difference of two accuracies on the same questions (share, not percent), and its standard error.

    Raises:
        MixheadError: where the two do not hold answers to the same number of questions.
    """
    if len(new.hits) != len(base.hits) or not new.hits:
        raise MixheadError(
            f"A paired gap needs both accuracies on the same questions, but they hold {len(new.hits)} and "
            f"{len(base.hits)} answers."
        )
    gaps = [float(a) - float(b) for a, b in zip(new.hits, base.hits, strict=True)]
    return statistics.fmean(gaps), _stderr(gaps)


def _stderr(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Row:
    """One model in a comparison.

    Attributes:
        name: what the model is, for example "original" or "mixhead, calibrated and tuned".
        active_heads: heads that a token uses, the mean over layers; may be broken.
        heads: heads of a layer.
        tuning_tokens: tokens that it was tuned on; 0 if it was not.
        perplexity: on held-out text.
        cloze: accuracy at the last word of a sentence; None if not measured.
        choice: accuracy at choosing the true continuation among four; None if not measured.
        seconds: wall time to make this row: calibration, tuning and evaluation.
        original: whether this is the original model (tuned or not), the measure of the other rows.
    """

    name: str
    active_heads: float
    heads: int
    tuning_tokens: int
    perplexity: Perplexity
    cloze: Accuracy | None = None
    choice: Accuracy | None = None
    seconds: float = 0.0
    original: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.active_heads <= self.heads:
            raise MixheadError(
                f"The row {self.name!r} states {self.active_heads:g} active heads of {self.heads}; "
                f"give a number above 0 and at most {self.heads}."
            )
        if self.tuning_tokens < 0 or self.seconds < 0:
            raise MixheadError(f"The row {self.name!r} states a negative number of tuning tokens or seconds.")

    @property
    def heads_active(self) -> str:
        """For example "7 of 9 (77.8%)"."""
        active = f"{self.active_heads:.2f}".rstrip("0").rstrip(".")
        return f"{active} of {self.heads} ({100 * self.active_heads / self.heads:.1f}%)"


@dataclass(frozen=True)
class Table:
    """The comparison that is always the same: originals, the published recipe, ours.

    Attributes:
        title: what is compared, on which text.
        rows: one a model. The ratio of a row is to the row of the original with as many tuning tokens.
        notes: lines below the table: windows, data, machine, the command that makes the table again.
    """

    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    COLUMNS = (
        "model",
        "heads active",
        "tuning tokens",
        "perplexity",
        "x original, same tokens",
        "cloze",
        "choice of 4",
        "wall time",
    )

    def base_of(self, row: Row) -> Row | None:
        """The original tuned on the same number of tokens, or None where the table has none."""
        matching = (other for other in self.rows if other.original and other.tuning_tokens == row.tuning_tokens)
        return next(matching, None)

    def ratio(self, row: Row) -> float | None:
        """The row's perplexity over that of the original tuned on the same tokens; None where there is none."""
        base = self.base_of(row)
        return None if base is None else math.exp(row.perplexity.mean_nll - base.perplexity.mean_nll)

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text, one tuple a row, in the order of `COLUMNS`."""
        return [
            (
                row.name,
                row.heads_active,
                f"{row.tuning_tokens:,}",
                f"{row.perplexity.perplexity:.2f}",
                "—" if (ratio := self.ratio(row)) is None else f"{ratio:.3f}",
                "—" if row.cloze is None else str(row.cloze),
                "—" if row.choice is None else str(row.choice),
                _duration(row.seconds),
            )
            for row in self.rows
        ]

    def to_markdown(self) -> str:
        """The table with its title and notes in Markdown."""
        lines = [self.COLUMNS, ("---", *("---:" for _ in self.COLUMNS[1:])), *self.cells()]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        notes = "".join(f"\n- {note}" for note in self.notes)
        return f"### {self.title}\n\n{table}\n" + (f"{notes}\n" if notes else "")

    def to_json(self) -> str:
        """Everything that was measured, unrounded, with perplexity and ratio spelled out in each row."""
        rows = [
            {**dataclasses.asdict(row), "perplexity_value": row.perplexity.perplexity, "ratio": self.ratio(row)}
            for row in self.rows
        ]
        return json.dumps({"title": self.title, "rows": rows, "notes": list(self.notes)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Table:
        """Reads what `to_json` wrote.

        Raises:
            MixheadError: where the text is no such table.
        """
        try:
            data = json.loads(text)
            return cls(data["title"], tuple(_row_from(row) for row in data["rows"]), tuple(data["notes"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MixheadError(
                f"This is not a table that mixhead wrote ({error}); give the JSON of Table.to_json."
            ) from error

    def to_rich(self) -> rich.table.Table:
        """The table for a terminal."""
        import rich.table  # only terminals need it

        table = rich.table.Table(title=self.title, caption="\n".join(self.notes) or None)
        for index, column in enumerate(self.COLUMNS):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row, cells in zip(self.rows, self.cells(), strict=True):
            table.add_row(*cells, style="dim" if row.original else None)
        return table


def _row_from(data: dict[str, Any]) -> Row:
    known = {field.name: data[field.name] for field in dataclasses.fields(Row)}
    measured = known["perplexity"]
    known["perplexity"] = Perplexity(**{**measured, "window_nll": tuple(measured["window_nll"])})
    for name in ("cloze", "choice"):
        if known[name] is not None:
            known[name] = Accuracy(**{**known[name], "hits": tuple(known[name]["hits"])})
    return Row(**known)


def _duration(seconds: float) -> str:
    """For example "8.3 s", "2 min 05 s" or "1 h 04 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
