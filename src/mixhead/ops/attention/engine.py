"""An engine is a value: a name, what it computes, and why it cannot take some arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mixhead.routing import Routing


class Attend(Protocol):
    """What an engine computes: checked arguments in, [B, H, N, D] out. A mask has 4 dimensions."""

    def __call__(
        self,
        q_BHND: Tensor,
        k_BKTD: Tensor,
        v_BKTD: Tensor,
        routing: Routing,
        /,
        *,
        causal: bool,
        scale: float,
        attn_mask: Tensor | None,
    ) -> Tensor: ...


def never(
    q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing, attn_mask: Tensor | None = None
) -> str | None:
    """The refusal of an engine that takes everything."""
    return None


@dataclass(frozen=True)
class Engine:
    """One way to compute `head_attention`.

    Attributes:
        name: what `impl=` says.
        attend: see `Attend`; called where `refusal` is None.
        refusal: (q_BHND, k_BKTD, v_BKTD, routing, attn_mask) to a sentence, or None.
    """

    name: str
    attend: Attend
    refusal: Callable[[Tensor, Tensor, Tensor, Routing, Tensor | None], str | None] = never
