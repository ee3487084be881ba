"""The engines as parameters of tests: one that cannot run in this process is skipped, with its own reason."""

import pytest
import torch

from mixhead.ops import IMPLEMENTATIONS
from mixhead.routing import Routing
from mixhead.routing.selection import grouped_top_k_mask


def engines(*without):
    """All implementations but these."""
    names = [name for name in IMPLEMENTATIONS if name not in without]
    return [
        pytest.param(name, marks=[pytest.mark.skip(reason=why)] if (why := missing(name)) else []) for name in names
    ]


def missing(impl):
    """What this process lacks to run an engine; None where nothing."""
    x, routing = torch.ones(1, 1, 16, 16), Routing.from_gates(torch.ones(1, 16, 1))
    return IMPLEMENTATIONS[impl].refusal(x, x, x, routing, None)


def balanced(selected_BNH, kv_heads):
    """Much the same selection, with equally many heads in every group for every token, which slots need."""
    group = selected_BNH.shape[-1] // kv_heads
    count = round(group * selected_BNH.float().mean().item())
    return grouped_top_k_mask(selected_BNH + torch.rand(selected_BNH.shape), count * kv_heads, kv_heads)
