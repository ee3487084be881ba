"""One product over all heads: what sparsity has to beat.

Shape legend: B batch, N tokens, C hidden size, H heads (or experts), D head dim (or width of an expert), M rows that
select one head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixhead.ops.engine import Engine
from mixhead.ops.projections.engine import Projections


def to_heads(hidden_BNC: Tensor, weight_HDC: Tensor, bias_HD: Tensor | None, selected_BNH: Tensor) -> Tensor:
    """`F.linear` to all heads, then 0 where a head is not selected."""
    bias_X = None if bias_HD is None else bias_HD.flatten()
    q_BNX = F.linear(hidden_BNC, weight_HDC.flatten(0, 1), bias_X)
    q_BNHD = q_BNX.unflatten(-1, weight_HDC.shape[:2])
    return torch.where(selected_BNH.unsqueeze(-1), q_BNHD, 0.0).transpose(1, 2)


def from_heads(
    out_BHND: Tensor, weight_HDC: Tensor, bias_C: Tensor | None, selected_BNH: Tensor, gates_BNH: Tensor | None
) -> Tensor:
    """0 where a head is not selected, then `F.linear` from all heads."""
    out_BNHD = out_BHND.transpose(1, 2)
    gated_BNHD = out_BNHD if gates_BNH is None else out_BNHD * gates_BNH.unsqueeze(-1).to(out_BHND.dtype)
    kept_BNHD = torch.where(selected_BNH.unsqueeze(-1), gated_BNHD, 0.0)
    return F.linear(kept_BNHD.flatten(2), weight_HDC.permute(2, 0, 1).flatten(1), bias_C)


ENGINE = Engine("dense", Projections(to_heads, from_heads))
