"""`Routing`: which heads every token uses, and with which weight.

Shape legend of this room: B batch, N tokens (queries), H query heads, E routed heads (those that compete), C hidden
size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.routing.losses import balance_loss, masked_token_mean


@dataclass(frozen=True, eq=False)
class Routing:
    """What a router decides for one layer: a value that is passed on, never stored globally.

    Attributes:
        gates_BNH: weight of each head for each token, floating point; exactly 0 where a head is not selected.
        selected_BNH: bool, True where the token uses the head.
        probs_BNH: router probabilities over the routed heads (they sum to 1 per token), 0 at shared heads; None where
            nothing competes, so that there is nothing to balance.
        num_routed_heads: E, how many heads compete.
        token_mask_BN: bool, True at real tokens and False at padding; None means that every token is real.
        heads_per_group: the router's promise, by construction, that every token uses exactly this many heads of each
            group; None where it promises nothing. Operators pack heads by it without reading any tensor.
        num_groups: how many groups that promise is about; each is a run of H / num_groups heads.
    """

    gates_BNH: Tensor
    selected_BNH: Tensor
    probs_BNH: Tensor | None = None
    num_routed_heads: int = 0
    token_mask_BN: Tensor | None = None
    heads_per_group: int | None = None
    num_groups: int = 1

    @classmethod
    def from_gates(cls, gates_BNH: Tensor) -> Routing:
        """A routing from its weights alone: a head is selected where its gate is not 0.

        Raises:
            MixheadError: where `gates_BNH` is not a floating point tensor with three dimensions.
        """
        if gates_BNH.dim() != 3 or not gates_BNH.is_floating_point():
            raise MixheadError(
                "gates_BNH must be a floating point tensor of shape [batch, tokens, heads], "
                f"but it is {gates_BNH.dtype} of shape {list(gates_BNH.shape)}."
            )
        return cls(gates_BNH=gates_BNH, selected_BNH=gates_BNH != 0)

    def slots(self, num_key_value_heads: int) -> int | None:
        """How many heads every token uses of those that share one key-value head; None where nobody promised it."""
        if self.heads_per_group is None or self.num_groups % num_key_value_heads:
            return None
        return self.heads_per_group * (self.num_groups // num_key_value_heads)

    @property
    def balance_loss(self) -> Tensor:
        """The load-balance loss of this layer as the official code computes it: E * sum_i P_i f_i, a 0-d tensor.

        MoH (arXiv 2410.11842) eq. 7 times E. It is top_k at uniform routing and 0 where nothing competes.
        """
        if self.probs_BNH is None:
            return self.gates_BNH.new_zeros(())
        return balance_loss(self.probs_BNH, self.selected_BNH, self.num_routed_heads, self.token_mask_BN)

    @property
    def load_H(self) -> Tensor:
        """Share of the real tokens that use each head ("density" in the MoH paper), float32, shape [H]."""
        return masked_token_mean(self.selected_BNH, self.token_mask_BN)

    @property
    def active_share(self) -> Tensor:
        """Share of all heads that an average real token uses, a 0-d float32 tensor."""
        return self.load_H.mean()


def mean_balance_loss(routings: Iterable[Routing]) -> Tensor | None:
    """Mean of the layers' balance losses, as the official code averages them; None where nothing competes."""
    losses = [routing.balance_loss for routing in routings if routing.probs_BNH is not None]
    return torch.stack(losses).mean() if losses else None
