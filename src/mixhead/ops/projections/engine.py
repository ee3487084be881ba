"""What an engine of the projections runs, and how the weights of heads are cut from those of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Projections(NamedTuple):
    """The two projections of one engine, where what is not selected is 0.

    Attributes:
        to_heads: (hidden_BNC, weight_HDC, bias_HD, selected_BNH) to [B, H, N, D].
        from_heads: (out_BHND, weight_HDC, bias_C, selected_BNH, gates_BNH) to [B, N, C].
    """

    to_heads: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
    from_heads: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor | None], Tensor]


def weight_by_head(weight_CX: Tensor, num_heads: int) -> Tensor:
    """The weight [C, H D] of an output projection as the weights of its heads, a view [H, D, C]."""
    return weight_CX.unflatten(1, (num_heads, -1)).permute(1, 2, 0)
