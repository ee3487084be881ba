"""`RoutingTrace`: collects the routings of one forward call.

It is made by whoever wants to look (the converted model for its loss, a user through `record_routing`, calibration) and
handed down through keyword arguments, which every transformers model passes on to its attention function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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

    def observe(
        self, name: str, hidden_BNC: Tensor, q_BHND: Tensor, heads_BHND: Tensor, token_mask_BN: Tensor | None
    ) -> None:
        """Shows it to the second."""
        self.second.observe(name, hidden_BNC, q_BHND, heads_BHND, token_mask_BN)


class RoutingLog(RoutingTrace):
    """A trace without gradients: what every token used, kept on the CPU as bool."""

    def record(self, name: str, routing: Routing) -> None:
        """Keeps the selection and the gates, detached."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # Gradient checkpointing computes a layer once more during backward, which is no further use.
        mask = routing.token_mask_BN
        super().record(
            name,
            Routing(
                gates_BNH=routing.gates_BNH.detach().cpu(),
                selected_BNH=routing.selected_BNH.cpu(),
                token_mask_BN=None if mask is None else mask.cpu(),
            ),
        )

    def selected(self, name: str) -> Tensor:
        """All selections of one module, one call after the other along the tokens: bool [B, N, H]."""
        return torch.cat([routing.selected_BNH for layer, routing in self.layers if layer == name], dim=1)

    def load(self) -> dict[str, Tensor]:
        """Share of the real tokens that used each head, float32 [H], for every module that routes."""
        names = dict.fromkeys(name for name, _ in self.layers)
        return {name: self._load_of(name) for name in names}

    def _load_of(self, name: str) -> Tensor:
        routings = [routing for layer, routing in self.layers if layer == name]
        used = torch.stack([(r.selected_BNH * real_tokens(r).unsqueeze(-1)).sum((0, 1)) for r in routings]).sum(0)
        return used.float() / max(sum(int(real_tokens(r).sum()) for r in routings), 1)


def real_tokens(routing: Routing) -> Tensor:
    """bool [B, N], True at tokens that are no padding."""
    if routing.token_mask_BN is not None:
        return routing.token_mask_BN
    return torch.ones(routing.selected_BNH.shape[:2], dtype=torch.bool)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingLog]:
    """`with mixhead.record_routing(model) as log: model(**inputs)` keeps what every token used in every layer."""
    log = RoutingLog()

    def hand_down(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        del module
        trace = kwargs.get("routing_trace")
        if trace is None:
            return args, {**kwargs, "routing_trace": log}
        if trace is log or (isinstance(trace, JoinedTrace) and trace.second is log):
            return args, kwargs
        return args, {**kwargs, "routing_trace": JoinedTrace(log, trace)}

    # At the attention modules, so that it works under any wrapper and where generation calls a part of the model. A
    # compiled model no longer looks at their hooks; there the outermost module passes the log in.
    sites = [module for module in model.modules() if hasattr(module, "moh_router")]
    outermost = [model] if hasattr(model, "_orig_mod") else []
    handles = [module.register_forward_pre_hook(hand_down, with_kwargs=True) for module in [*outermost, *sites]]
    try:
        yield log
    finally:
        for handle in handles:
            handle.remove()
