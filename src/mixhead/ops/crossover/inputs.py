"""Random numbers to race on, apart from everybody else's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixhead.ops.crossover.race import Call
from mixhead.routing import Routing


def normal(*shape: int) -> Tensor:
    """float32 on the CPU, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)


def gated_routing(batch: int, tokens: int, heads: int, share: float, dtype: torch.dtype) -> Routing:
    """Every token uses round(share * H) heads, at random, as many of one key-value head as of another."""
    order_BNH = torch.rand(batch, tokens, heads, generator=torch.Generator().manual_seed(1)).argsort(-1).argsort(-1)
    active = max(1, round(share * heads))
    selected_BNH = order_BNH < active
    return Routing((selected_BNH * 0.75).to(dtype), selected_BNH, heads_per_group=active)


def without_gradient(call: Callable[[], object]) -> Call:
    """The call as in inference."""

    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def with_gradient(call: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Call:
    """A forward and a backward pass."""

    def run() -> object:
        out = call()
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run
