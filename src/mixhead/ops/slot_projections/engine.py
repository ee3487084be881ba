"""What an engine of the projections runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class SlotProjections(NamedTuple):
    """The two projections of one engine, where an empty slot is 0.

    Attributes:
        to_slots: (hidden_BNC, weight_EDC, expert_BNS) to [B, N, S, D].
        from_slots: (out_BNSD, weight_EDC, expert_BNS, gates_BNS) to [B, N, C].
    """

    to_slots: Callable[[Tensor, Tensor, Tensor], Tensor]
    from_slots: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
