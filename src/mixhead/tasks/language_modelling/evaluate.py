"""Perplexity on token windows, and how sure two measurements on the same questions are of their difference.

Shape legend of this file: W windows, B windows in one batch, T tokens in one window, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixhead.errors import MixheadError
from mixhead.models.hugging_face import MoHModelMixin
from mixhead.modes import autocast_to, evaluation_mode


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
