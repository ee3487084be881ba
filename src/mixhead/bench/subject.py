"""What a benchmark measures: the dense baseline, official-style masking, and every engine of `head_attention`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.ops import IMPLEMENTATIONS, cpu

# The two that are not ours: dense attention of all heads, and dense attention followed by the gates, as the published
# implementations compute mixture-of-head attention.
SDPA, MASKED = "sdpa", "masked"
AUTO = "auto"
NOT_TIMED = ("reference",)


class Subject(Protocol):
    """Something that runs under every engine, built for one shape, dtype and routing."""

    @property
    def tolerance(self) -> float:
        """The largest error, relative to the largest number, that counts as right."""

    def call(self, engine: str) -> Callable[[], object]:
        """One run under that engine. Raises a `MixheadError` where the engine cannot."""

    def error(self, engine: str) -> float:
        """The largest error against float64, relative to the largest number; NaN and infinity are as wrong as any."""


class Spec(Protocol):
    """How to build a subject; it can be sent to another process."""

    @property
    def subject(self) -> str:
        """`core`, `module` or `model`."""

    @property
    def title(self) -> str:
        """The shape, in words."""

    @property
    def direction(self) -> str:
        """What is computed, in words."""

    @property
    def dtype(self) -> str:
        """The name of the dtype."""

    @property
    def routing(self) -> str:
        """How heads are chosen."""

    @property
    def share(self) -> float:
        """The share of the heads that an average token uses."""

    def build(self) -> Subject:
        """Makes it, always from the same random numbers."""

    def small(self) -> Spec:
        """The same on a few tokens."""


def engines_to_time() -> list[str]:
    """Masking, `auto`, and every engine but those that exist to define what is right."""
    return [MASKED, AUTO, *(name for name in IMPLEMENTATIONS if name not in NOT_TIMED)]


def engine_name(text: str) -> str:
    """The name of an engine, or a `MixheadError`."""
    if text not in (SDPA, MASKED, AUTO, *IMPLEMENTATIONS):
        known = ", ".join((MASKED, AUTO, *IMPLEMENTATIONS))
        raise MixheadError(f"There is no engine {text!r}: choose from {known}.")
    return text


def check_engine(engine: str, q_BHND: Tensor) -> None:
    """Raises a `MixheadError` where an engine is unknown, or would silently hand over to another one."""
    engine_name(engine)
    if engine == "cpu" and (reason := cpu.refusal(q_BHND, None)):
        raise MixheadError(f"{reason[:1].upper()}{reason[1:]}.")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name."""
    if name not in ("float32", "bfloat16", "float64"):
        raise MixheadError(f"--dtype {name} is unknown: choose float32, bfloat16 or float64.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def largest_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of any pair, relative to the largest number expected; infinite where it is NaN."""
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        error = ((a.double() - e).abs().max() / e.abs().max().clamp_min(1e-9)).item()
        worst = max(worst, error) if error == error else float("inf")
    return worst
