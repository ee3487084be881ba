"""`RoutingTrace`: collects the routings of one forward call.

It is made by whoever computes with the routings of a call, as a loss does, and handed down through keyword arguments,
which every transformers model passes on to its attention function. Who only wants to look uses
`mixhead.record_routing`.
"""

from __future__ import annotations

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

    def balance_loss(self) -> Tensor | None:
        """Mean of the layers' balance losses, as the official code averages them; None where nothing competes."""
        return mean_balance_loss(routing for _, routing in self.layers)
