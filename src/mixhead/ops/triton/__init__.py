"""Attention of the selected heads on the GPU: Triton kernels, forward and backward.

Queries that select a head are gathered, so the others cost nothing; no N x T tensor exists, and the host never waits.
How they work is told in `kernels`. Triton is optional and imported when a kernel runs first. The kernels are tested for
correctness in Triton's interpreter, and were never timed.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from mixhead.ops.constant import constant_when_compiled
from mixhead.ops.triton.operators import attend

__all__ = ["attend", "refusal"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def refusal(q_BHND: Tensor, attn_mask: Tensor | None) -> str | None:
    """Why the kernels cannot take these arguments, in a sentence; None where they can."""
    if q_BHND.dtype not in DTYPES:
        return f"the Triton kernels compute in float32, bfloat16 and float16, not in {q_BHND.dtype}"
    if q_BHND.shape[-1] > MAX_HEAD_DIM:
        return f"the Triton kernels take heads up to {MAX_HEAD_DIM} wide, and these are {q_BHND.shape[-1]} wide"
    if attn_mask is not None and attn_mask.requires_grad:
        return "the Triton kernels have no gradient of the mask"
    return missing(q_BHND.device.type)


@constant_when_compiled
@functools.cache
def missing(device_type: str) -> str | None:
    """What a device lacks to run Triton, in a sentence; None where nothing. On the CPU it imports Triton to know."""
    if device_type not in ("cuda", "cpu"):
        return f"the Triton kernels run on CUDA devices, and the queries are on {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: it comes with the CUDA builds of PyTorch"
    if device_type == "cuda":
        return None
    from mixhead.ops.triton import kernels

    if not kernels.INTERPRETED:
        return (
            "on the CPU the Triton kernels run in Triton's interpreter only, for tests: set TRITON_INTERPRET=1 in the "
            "environment before Python starts, or use a CUDA device"
        )
    return None
