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

__all__ = ["attend", "available", "best_level", "build", "is_default", "pays", "refusal", "transformed"]

DTYPES = (torch.float32, torch.bfloat16)

# With heads at least so wide the kernel is faster than the stock one on all heads and the gating after it, at every
# size measured, from one query and one key on and whatever the routing: `mixhead bench core` (1 thread). Narrower heads
# were slower or not measured.
MIN_HEAD_DIM = 32
# torch.compile fuses the gating, so there the stock kernel alone has to be beaten, at 100% of the heads too: from so
# many queries on, or up to so many against so many keys, as in decoding.
MIN_QUERIES_COMPILED = {torch.float32: 512, torch.bfloat16: 1024}
MAX_FEW_QUERIES_COMPILED = {torch.float32: 4, torch.bfloat16: 0}
MIN_KEYS_COMPILED = 256
# The instruction sets on which that holds. bf16 without its own instructions goes through float32, as in the
# stock kernel.
LEVELS = dict.fromkeys(DTYPES, ("amx", "avx512_bf16", "avx512", "avx2"))


def refusal(q_BHND: Tensor, attn_mask: Tensor | None) -> str | None:
    """Why the kernel cannot take these arguments, in a sentence; None where it can. May build the kernel."""
    if q_BHND.device.type != "cpu":
        return f"the kernel runs on the CPU, and the queries are on {q_BHND.device.type}"
    if q_BHND.dtype not in DTYPES:
        return f"the kernel computes in float32 and bfloat16, not in {q_BHND.dtype}"
    if attn_mask is not None and attn_mask.requires_grad:
        return "the kernel has no gradient of the mask"
    return unusable()


def is_default(q_BHND: Tensor) -> bool:
    """Whether the kernel is loaded and `pays` outside of torch.compile, asked in the fewest steps."""
    return (
        loaded_level() in LEVELS.get(q_BHND.dtype, ())
        and q_BHND.is_cpu
        and q_BHND.dim() == 4
        and q_BHND.shape[3] >= MIN_HEAD_DIM
    )


def pays(q_BHND: Tensor, k_BKTD: Tensor) -> bool:
    """Whether the kernel is faster than the stock one, by dtype and shape alone: nothing is built or counted."""
    if best_level() not in LEVELS.get(q_BHND.dtype, ()) or q_BHND.shape[3] < MIN_HEAD_DIM:
        return False
    if not torch.compiler.is_compiling():
        return True
    queries, keys = q_BHND.shape[2], k_BKTD.shape[2]
    few = queries <= MAX_FEW_QUERIES_COMPILED[q_BHND.dtype] and keys >= MIN_KEYS_COMPILED
    return few or queries >= MIN_QUERIES_COMPILED[q_BHND.dtype]
