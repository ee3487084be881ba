"""`TranslateConfig`: how lines are translated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixhead.errors import MixheadError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TranslateConfig:
    """How lines are translated.

    Attributes:
        beams: of beam search; 1 takes the likeliest token.
        length_penalty: the score of a translation is divided by its length to this power.
        batch_tokens: source tokens of a batch, padding included.
        look_ahead: lines that are read before the first of them is translated, to sort them by length.
        max_source_tokens: longer lines are cut at spaces into pieces, which are translated one by one.
        dtype: for autocast; None computes in the model's own.
    """

    beams: int = 4
    length_penalty: float = 0.6
    batch_tokens: int = 2048
    look_ahead: int = 512
    max_source_tokens: int = 200
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("beams", "batch_tokens", "look_ahead", "max_source_tokens"):
            if getattr(self, name) < 1:
                raise MixheadError(f"{name}={getattr(self, name)} must be at least 1.")
