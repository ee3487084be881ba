"""Whether the kernels can run now: they are compiled and loaded, and nobody asks for what they have no formula for."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from mixhead.ops.cpu.loading import available


def unusable(library: str = "attention") -> str | None:
    """Why the kernels of a library cannot run now, in a sentence; None where they can. May build them."""
    if transformed():
        return "the C++ kernels have no rules for torch.func, forward-mode derivatives and torch.jit.trace"
    built, reason = available(library)
    return None if built else reason


def transformed() -> bool:
    """Whether torch.func, forward-mode differentiation or torch.jit.trace is at work.

    Operators without rules of their own would not fail then: their tangents would be zero. A trace would hold the
    numbers of its example.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        forward_ad._current_level >= 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
    )
