"""Arguments of the C++ kernel, and what it makes of them beside the reference."""

import pytest
import torch

from mixhead.ops import cpu, head_attention
from mixhead.routing import Routing

BUILT, WHY_NOT = cpu.available()
needs_kernel = pytest.mark.skipif(not BUILT, reason=WHY_NOT)


def make(queries, keys=None, *, batch=2, heads=4, kv_heads=4, head_dim=64, share=0.5, dtype=torch.float32):
    keys = queries if keys is None else keys
    q = torch.randn(batch, heads, queries, head_dim).to(dtype)
    k, v = (torch.randn(batch, kv_heads, keys, head_dim).to(dtype) for _ in range(2))
    selected = torch.rand(batch, queries, heads) < share
    gates = (torch.rand(batch, queries, heads) + 0.5).to(dtype)
    return q, k, v, gates, selected


def outcome(q, k, v, gates, selected, grad, impl="cpu", **kwargs):
    """Output and gradients of q, k, v and the gates (those at selected heads)."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, gates)]
    routing = Routing(torch.where(selected, leaves[3], 0.0), selected)
    out = head_attention(*leaves[:3], routing, impl=impl, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def exact(q, k, v, gates, selected, grad, **kwargs):
    wide = {n: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in kwargs.items()}
    return outcome(*(t.double() for t in (q, k, v, gates)), selected, grad.double(), impl="reference", **wide)


NAMES = ("out", "dq", "dk", "dv", "dgates")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def assert_close_to_reference(inputs, tolerance=None, **kwargs):
    grad = torch.randn_like(inputs[0])
    tolerance = TOLERANCE[grad.dtype] if tolerance is None else tolerance
    for name, a, e in zip(NAMES, outcome(*inputs, grad, **kwargs), exact(*inputs, grad, **kwargs), strict=True):
        error = (a - e).abs().max().item() if a.numel() else 0.0
        assert error <= tolerance * max(1.0, e.abs().max().item()), f"{name}: {error}"
