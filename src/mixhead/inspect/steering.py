"""Changes which heads a model uses while it runs: heads switched off, or another number of them.

Shape legend: B batch, N tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mixhead.errors import MixheadError
from mixhead.recording.listen import routers_by_layer
from mixhead.routing import Router, Routing, top_k_mask


@dataclass(frozen=True)
class Steering:
    """What is to be different.

    Attributes:
        active_heads: how many heads every token uses in every layer, as far as heads are left; None as routed.
        off: heads that no token may use, by layer.
    """

    active_heads: int | None = None
    off: Mapping[str, Collection[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.active_heads is not None and self.active_heads < 1:
            raise MixheadError(f"active_heads={self.active_heads} is too few: a token must use at least one head.")


class SteeredRouter(Router):
    """Asks a router, then chooses again among the heads that are left, by the same probabilities.

    Args:
        router: the router of the layer.
        active_heads: how many heads a token shall use; None as many as the router chose.
        off: heads that may not be used.
    """

    def __init__(self, router: nn.Module, active_heads: int | None, off: Collection[int]) -> None:
        super().__init__()
        self.router, self.active_heads, self.off = router, active_heads, sorted(off)
        self.needs_query = getattr(router, "needs_query", True)

    def forward(
        self, hidden_BNC: Tensor | None, q_BHND: Tensor | None = None, token_mask_BN: Tensor | None = None
    ) -> Routing:
        own: Routing = self.router(hidden_BNC, q_BHND, token_mask_BN)
        heads = own.selected_BNH.shape[-1]
        if own.probs_BNH is None:
            rank_BNH = own.gates_BNH.float().clone()
        else:  # shared heads have no probability, and come first
            rank_BNH = own.probs_BNH.masked_fill(own.selected_BNH & (own.probs_BNH == 0), torch.inf)
        rank_BNH[..., self.off] = -torch.inf
        wanted = int(own.selected_BNH.sum(-1).max()) if self.active_heads is None else self.active_heads
        selected_BNH = top_k_mask(rank_BNH, min(wanted, heads - len(self.off)))
        return replace(own, selected_BNH=selected_BNH, gates_BNH=self._gates(own, selected_BNH), heads_per_group=None)

    @staticmethod
    def _gates(own: Routing, selected_BNH: Tensor) -> Tensor:
        """The router's gates of the heads chosen now; a head that it left out gets the mean of its gates."""
        mean_BN1 = own.gates_BNH.sum(-1, keepdim=True) / own.selected_BNH.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(own.selected_BNH, own.gates_BNH, mean_BN1) * selected_BNH


@contextmanager
def steered(model: nn.Module, steering: Steering) -> Iterator[None]:
    """Within the block the model routes as the steering says; then it has its own routers again.

    Raises:
        MixheadError: where a layer or a head does not exist, or no head would be left.
    """
    routers = routers_by_layer(model)
    for layer, heads in steering.off.items():
        if heads and layer not in routers:
            raise MixheadError(f"No layer {layer!r} routes: choose one of {', '.join(routers)}.")
        count = getattr(routers.get(layer), "num_heads", None)
        if count is not None and (len({*heads}) >= count or any(not 0 <= head < count for head in heads)):
            raise MixheadError(f"{layer} has the heads 0 to {count - 1}, and at least one must stay: not {[*heads]}.")
    held = {router: (holder, name) for holder in model.modules() for name, router in holder.named_children()}
    places = [(*held[router], router, layer) for layer, router in routers.items()]
    try:
        for holder, name, router, layer in places:
            setattr(holder, name, SteeredRouter(router, steering.active_heads, steering.off.get(layer, ())))
        yield
    finally:
        for holder, name, router, _layer in places:
            setattr(holder, name, router)
