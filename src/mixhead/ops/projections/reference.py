"""The masked mathematics, one line a step.

Shape legend: B batch, N tokens, C hidden size, H heads (or experts), D head dim (or width of an expert), M rows that
select one head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixhead.ops.engine import Engine
from mixhead.ops.projections.engine import Projections


def to_heads(hidden_BNC: Tensor, weight_HDC: Tensor, bias_HD: Tensor | None, selected_BNH: Tensor) -> Tensor:
    """All queries by einsum, those that are not selected replaced by 0."""
    q_BHND = torch.einsum("bnc,hdc->bhnd", hidden_BNC, weight_HDC)
    if bias_HD is not None:
        q_BHND = q_BHND + bias_HD[:, None]
    return torch.where(by_head(selected_BNH), q_BHND, 0.0)


def from_heads(
    out_BHND: Tensor, weight_HDC: Tensor, bias_C: Tensor | None, selected_BNH: Tensor, gates_BNH: Tensor | None
) -> Tensor:
    """The sum over all heads by einsum, those that are not selected replaced by 0."""
    gated_BHND = out_BHND if gates_BNH is None else out_BHND * by_head(gates_BNH).to(out_BHND.dtype)
    y_BNC = torch.einsum("bhnd,hdc->bnc", torch.where(by_head(selected_BNH), gated_BHND, 0.0), weight_HDC)
    return y_BNC if bias_C is None else y_BNC + bias_C


def by_head(x_BNH: Tensor) -> Tensor:
    """[B, N, H] as [B, H, N, 1], beside the rows of the heads."""
    return x_BNH.transpose(1, 2).unsqueeze(-1)


ENGINE = Engine("reference", Projections(to_heads, from_heads))
