"""Attention of the selected heads on the CPU: a C++ kernel, forward and backward, compiled on first use.

Queries that select a head are gathered, so the others cost nothing; no N x T tensor exists. How it works is told in
`source/attention.h`, and for a few queries against a cache in `source/decode.h`. Without a compiler, or where nothing
can be written, `available` says so and callers take portable PyTorch instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixhead.ops.cpu.level import best_level
from mixhead.ops.cpu.loading import available, build, loaded_level
from mixhead.ops.cpu.operators import attend
from mixhead.ops.cpu.usable import transformed, unusable

__all__ = ["attend", "available", "best_level", "build", "loaded_level", "refusal", "transformed"]

DTYPES = (torch.float32, torch.bfloat16)


def refusal(q_BHND: Tensor, attn_mask: Tensor | None) -> str | None:
    """Why the kernel cannot take these arguments, in a sentence; None where it can. May build the kernel."""
    if q_BHND.device.type != "cpu":
        return f"the kernel runs on the CPU, and the queries are on {q_BHND.device.type}"
    if q_BHND.dtype not in DTYPES:
        return f"the kernel computes in float32 and bfloat16, not in {q_BHND.dtype}"
    if attn_mask is not None and attn_mask.requires_grad:
        return "the kernel has no gradient of the mask"
    return unusable()
