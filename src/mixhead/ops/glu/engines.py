"""All engines of `convolutional_glu`: (hidden_BNK, bias_K, weight_M33, conv_bias_M, size) to [B, N, M]."""

from __future__ import annotations

from mixhead.ops.cpu import convolutional_glu as kernel
from mixhead.ops.engine import Engine, table
from mixhead.ops.glu.reference import glu

GLU_IMPLEMENTATIONS = table(Engine("reference", glu), Engine("cpu", kernel.glu, kernel.refusal))
