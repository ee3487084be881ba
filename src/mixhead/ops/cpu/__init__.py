"""Attention of the selected heads on the CPU: a C++ kernel, forward and backward, compiled on first use.

Queries that select a head are gathered, so the others cost nothing; no N x T tensor exists. How it works is told in
`source/attention.h`. Without a compiler, or where nothing can be written, `available` says so and callers take portable
PyTorch instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixhead.ops.cpu.compiling import available, best_level, build
from mixhead.ops.cpu.operators import attend

__all__ = ["attend", "available", "best_level", "build", "crossover", "refusal"]

DTYPES = (torch.float32, torch.bfloat16)

# Where the kernel is at least as fast as the stock one, measured with `benchmarks/attention.py` (1 thread, 16 heads of
# 64): the largest share of selected heads, by dtype and least number of queries. Below all of these the stock kernel is
# taken, and also with fewer keys or narrower heads, which were slower or not measured.
CROSSOVER = {
    torch.float32: {512: 1.0, 128: 0.9, 64: 0.5},
    torch.bfloat16: {1024: 1.0, 192: 0.75},
}
MIN_KEYS = 64
MIN_HEAD_DIM = 32
# The instruction sets on which that holds. bf16 without its own instructions goes through float32.
LEVELS = {torch.float32: ("amx", "avx512_bf16", "avx512"), torch.bfloat16: ("amx", "avx512_bf16")}


def refusal(q_BHND: Tensor, attn_mask: Tensor | None) -> str | None:
    """Why the kernel cannot take these arguments, in a sentence; None where it can. May build the kernel."""
    if q_BHND.device.type != "cpu":
        return f"the kernel runs on the CPU, and the queries are on {q_BHND.device.type}"
    if q_BHND.dtype not in DTYPES:
        return f"the kernel computes in float32 and bfloat16, not in {q_BHND.dtype}"
    if attn_mask is not None and attn_mask.requires_grad:
        return "the kernel has no gradient of the mask"
    built, reason = available()
    return None if built else reason


def crossover(q_BHND: Tensor, k_BKTD: Tensor) -> float:
    """The largest share of selected heads at which the kernel pays, by shape and dtype; 0 where it never does."""
    queries, head_dim = q_BHND.shape[2], q_BHND.shape[3]
    if k_BKTD.shape[2] < MIN_KEYS or head_dim < MIN_HEAD_DIM or best_level() not in LEVELS.get(q_BHND.dtype, ()):
        return 0.0
    return next((share for least, share in CROSSOVER[q_BHND.dtype].items() if queries >= least), 0.0)
