"""Perplexity on token windows, and how sure two measurements on the same questions are of their difference.

Shape legend of this file: W windows, B windows in one batch, T tokens in one window, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixhead.data.windows import Windows
from mixhead.errors import MixheadError
from mixhead.intervals import MOST_FREEDOM, Floats, mean_band, share_band, t_quantile
from mixhead.models.context import check_ids, check_length, check_predicts
from mixhead.models.hugging_face import MoHModelMixin
from mixhead.modes import autocast_to, evaluation_mode


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        mean_nll: mean negative log-likelihood of a predicted token, in nats.
        tokens: predicted tokens (each window predicts all of its tokens but those that are given, the first as a rule).
        seconds: wall time of the measurement.
        window_nll: mean negative log-likelihood of each window, for paired comparisons.
        bytes: UTF-8 bytes of the predicted text; 0 where it is not known.
        windows: fingerprint of the windows; measurements of other windows cannot be compared window by window.
    """

    mean_nll: float
    tokens: int
    seconds: float
    window_nll: tuple[float, ...] = ()
    bytes: int = 0
    windows: str = ""

    @property
    def perplexity(self) -> float:
        """exp(mean_nll)."""
        return math.exp(min(self.mean_nll, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """What perplexities of different tokenizers are compared by; NaN where the text is not known."""
        return self.mean_nll * self.tokens / (math.log(2) * self.bytes) if self.bytes else math.nan


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

    @property
    def band(self) -> tuple[float, float]:
        """Between what shares the true one lies with 95% confidence (Wilson's interval)."""
        variance = self.value * (1 - self.value)
        worth = variance / self.stderr**2 + 1 if self.stderr > 0 else max(len(self.hits), 1)
        low, high = share_band(np.array([self.value]), np.array([worth]), MOST_FREEDOM)[0].tolist()
        return low, high

    def __str__(self) -> str:
        low, high = self.band
        return f"{100 * self.value:.1f}% ({100 * low:.0f}–{100 * high:.0f})"


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Tensor | Windows,
    batch_size: int = 4,
    *,
    autocast: torch.dtype | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measures the perplexity of a causal language model, every predicted token with the same weight.

    The model runs in evaluation mode; the mode of each of its modules is put back afterwards.

    Args:
        model: maps `input_ids` [B, T] to an output with `.logits` [B, T, V].
        windows: token ids, int64 [W, T], of the model's own tokenizer, as `token_windows` makes them; or what
            `text_windows` makes, which knows the bytes of the text too.
        batch_size: windows in one forward pass; it changes speed and memory, not the result.
        autocast: a dtype such as torch.bfloat16 for the forward pass; None computes in the model's own. The loss is
            always computed in float32 and summed in float64.
        on_progress: called with (windows done, all windows).

    Raises:
        MixheadError: where the windows have the wrong shape, do not fit the model, or the model gives NaN or infinity;
            where it sees what it shall predict.
    """
    text = windows if isinstance(windows, Windows) else Windows(windows, 1, torch.zeros(0))
    windows_WT = text.ids_WT
    if windows_WT.dim() != 2 or windows_WT.is_floating_point() or windows_WT.size(0) < 1 or windows_WT.size(1) < 2:
        raise MixheadError(
            f"windows_WT must hold token ids as integers of shape [windows, tokens], at least one window of two "
            f"tokens, but it is {windows_WT.dtype} of shape {list(windows_WT.shape)}."
        )
    if batch_size < 1:
        raise MixheadError(f"batch_size must be at least 1 window, but it is {batch_size}.")
    count, window = windows_WT.shape
    check_ids(model, windows_WT)
    check_length(model, window, "A window")
    device = next(model.parameters()).device
    window_nll: list[float] = []
    start = time.perf_counter()
    with evaluation_mode(model):
        if isinstance(model, PreTrainedModel):
            check_predicts(model, windows_WT[0].to(device))
        for ids_BT in windows_WT.split(batch_size):
            window_nll += _window_nll(model, ids_BT.to(device), autocast, text.given, first=len(window_nll))
            if on_progress is not None:
                on_progress(len(window_nll), count)
    seconds = time.perf_counter() - start
    return Perplexity(
        mean_nll=math.fsum(window_nll) / count,
        tokens=count * (window - text.given),
        seconds=seconds,
        window_nll=tuple(window_nll),
        bytes=int(text.bytes_W.sum()),
        windows=hashlib.sha256(windows_WT.cpu().contiguous().numpy().tobytes()).hexdigest(),
    )


def _window_nll(model: nn.Module, ids_BT: Tensor, autocast: torch.dtype | None, given: int, first: int) -> list[float]:
    """Mean negative log-likelihood of each window of a batch whose first window has the number `first`."""
    with autocast_to(autocast, ids_BT.device):
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    means: list[float] = []
    for row, (ids_T, logits_TV) in enumerate(zip(ids_BT, logits_BTV, strict=True)):
        nll_T = F.cross_entropy(
            logits_TV[given - 1 : -1].float(), ids_T[given:], reduction="none"
        )  # a window at a time: V is large
        mean = nll_T.double().mean().item()
        if not math.isfinite(mean):
            raise MixheadError(
                f"The model gives {mean} as the loss of window {first + row} (counted from 0); its weights or its "
                f"hidden states hold NaN or infinity, so no perplexity can be stated."
            )
        means.append(mean)
    return means


def heads_of(model: PreTrainedModel) -> tuple[float, int]:
    """(heads that a token uses in an average layer, heads of a layer) of a language model, converted or not.

    (0, 0) of one that has none, as Mamba, and where its configuration states no one number for all layers.
    """
    if isinstance(model, MoHModelMixin):
        layers = model.config.moh["layers"]
        return sum(layer["active_heads"] for layer in layers) / len(layers), layers[0]["num_heads"]
    try:
        heads = model.config.get_text_config(decoder=True).num_attention_heads
    except (AttributeError, RuntimeError):  # the latter where layers differ
        heads = 0
    return (heads, heads) if isinstance(heads, int) else (0, 0)


def ratio_band(new: Perplexity, base: Perplexity) -> tuple[float, float]:
    """Between what values the ratio of two perplexities on the same windows lies with 95% confidence.

    It says how sure the ratio is of this kind of text. Of one window it knows nothing: NaN.

    Raises:
        MixheadError: where the two do not hold the same number of windows.
    """
    low, high = mean_band(_window_gaps(new, base))
    return math.exp(low), math.exp(high)


def gap_band(new: Accuracy, base: Accuracy) -> tuple[float, float]:
    """Between what values the difference of two accuracies on the same questions lies with 95% confidence.

    Agresti and Min's interval: it adds half a question to each of the four ways in which two answers can turn out.

    Raises:
        MixheadError: where the two do not hold answers to the same number of questions.
    """
    gaps_N = _answer_gaps(new, base)
    count = len(gaps_N) + 2
    middle = gaps_N.sum() / count
    spread = t_quantile(MOST_FREEDOM) * math.sqrt((np.abs(gaps_N).sum() + 1 - count * middle**2) / count**2)
    return float(max(-1.0, middle - spread)), float(min(1.0, middle + spread))


def _window_gaps(new: Perplexity, base: Perplexity) -> Floats:
    """Differences of the windows' losses, float64 [W]."""
    if new.windows != base.windows:
        raise MixheadError(
            "A paired ratio needs both perplexities on the same windows, but these were cut by different tokenizers or "
            "from different texts: compare their bits_per_byte."
        )
    if len(new.window_nll) != len(base.window_nll) or not new.window_nll:
        raise MixheadError(
            f"A paired ratio needs both perplexities on the same windows, but they hold {len(new.window_nll)} and "
            f"{len(base.window_nll)} windows."
        )
    return np.array(new.window_nll) - np.array(base.window_nll)


def _answer_gaps(new: Accuracy, base: Accuracy) -> Floats:
    """1 where only the new one is right, -1 where only the old one is, else 0: float64, one a question."""
    if len(new.hits) != len(base.hits) or not new.hits:
        raise MixheadError(
            f"A paired gap needs both accuracies on the same questions, but they hold {len(new.hits)} and "
            f"{len(base.hits)} answers."
        )
    return np.array(new.hits, dtype=np.float64) - np.array(base.hits, dtype=np.float64)
