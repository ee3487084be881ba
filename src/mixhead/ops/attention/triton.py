"""The Triton kernels of `mixhead.ops.triton`, for GPUs."""

from __future__ import annotations

from mixhead.ops import triton
from mixhead.ops.engine import Engine

ENGINE = Engine("triton", triton.attend, lambda q, k, v, routing, mask: triton.refusal(q, mask))
