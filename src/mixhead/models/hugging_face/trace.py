"""`RoutingTrace`: collects the routings of one forward call.

It is made by whoever needs the routings of a call inside that call (the converted model for its loss, calibration) and
handed down through keyword arguments, which every transformers model passes on to its attention function. Who only
wants to look uses `mixhead.record_routing`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mixhead.routing import Routing, mean_balance_loss


class RoutingTrace:
    """The routings of the layers that route, in the order in which they ran.

    Attributes:
        layers: (name of the attention module, its routing) of every call.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[str, Routing]] = []

    def record(self, name: str, routing: Routing) -> None:
        """Keeps the routing of one attention module."""
        self.layers.append((name, routing))

    def routes(self, name: str) -> bool:
        """Whether that module shall route in this call; where it says no, all heads are used."""
        del name
        return True

    def wants_heads(self, name: str) -> bool:
        """Whether `observe` should be shown the outputs of all heads of that module."""
        del name
        return False

    def observe(
        self, name: str, hidden_BNC: Tensor, q_BHND: Tensor, heads_BHND: Tensor, token_mask_BN: Tensor | None
    ) -> None:
        """Shown what a module computes, where `wants_heads` said so; all heads are dense then."""

    def look(
        self,
        name: str,
        q_BHND: Tensor,
        k_BKTD: Tensor,
        routing: Routing,
        attn_mask: Tensor | None,
        scale: float | None,
        causal: bool,
    ) -> None:
        """Shown what the attention of a module that routes is computed from, as `head_attention` takes it."""

    def balance_loss(self) -> Tensor | None:
        """Mean of the layers' balance losses, as the official code averages them; None where nothing competes."""
        return mean_balance_loss(routing for _, routing in self.layers)


class JoinedTrace(RoutingTrace):
    """Two traces of one call: each records what passes, and the second says whether modules route."""

    def __init__(self, first: RoutingTrace, second: RoutingTrace) -> None:
        super().__init__()
        self.first, self.second = first, second

    def record(self, name: str, routing: Routing) -> None:
        """Records in both."""
        self.first.record(name, routing)
        self.second.record(name, routing)

    def routes(self, name: str) -> bool:
        """As the second says."""
        return self.second.routes(name)

    def wants_heads(self, name: str) -> bool:
        """As the second says."""
        return self.second.wants_heads(name)

    def observe(self, *args: Any, **kwargs: Any) -> None:
        """Shows it to the second."""
        self.second.observe(*args, **kwargs)

    def look(self, *args: Any, **kwargs: Any) -> None:
        """Shows it to the second."""
        self.second.look(*args, **kwargs)
