"""The mathematics, in portable PyTorch.

Shape legend: B batch, N = Y * X tokens of a map, M channels, K = 2 M channels of gates and values.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def glu(hidden_BNK: Tensor, bias_K: Tensor, weight_M33: Tensor, conv_bias_M: Tensor, size: tuple[int, int]) -> Tensor:
    """The mathematics in portable PyTorch, in the dtype of the hidden states."""
    bias_K, weight_M33, conv_bias_M = (t.to(hidden_BNK.dtype) for t in (bias_K, weight_M33, conv_bias_M))
    gate_BNM, value_BNM = (hidden_BNK + bias_K).chunk(2, dim=-1)
    gate_BMYX = gate_BNM.transpose(1, 2).unflatten(2, size)
    gate_BMYX = F.conv2d(gate_BMYX, weight_M33.unsqueeze(1), conv_bias_M, padding=1, groups=weight_M33.shape[0])
    return F.gelu(gate_BMYX).flatten(2).transpose(1, 2) * value_BNM
