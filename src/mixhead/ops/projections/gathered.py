"""A loop over the heads: portable PyTorch with any derivative.

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
    """One product for the rows of each head."""
    batch, tokens, _ = selected_BNH.shape
    hidden_RC, selected_HR = hidden_BNC.flatten(0, 1), selected_BNH.flatten(0, 1).T
    q_HRD = []
    for head, weight_DC in enumerate(weight_HDC.unbind()):
        row_M = selected_HR[head].nonzero().squeeze(1)
        x_MC = hidden_RC.index_select(0, row_M)
        q_MD = F.linear(x_MC, weight_DC, None if bias_HD is None else bias_HD[head])
        q_HRD.append(q_MD.new_zeros(batch * tokens, q_MD.shape[1]).index_copy(0, row_M, q_MD))
    return torch.stack(q_HRD, 1).unflatten(0, (batch, tokens)).transpose(1, 2)


def from_heads(
    out_BHND: Tensor, weight_HDC: Tensor, bias_C: Tensor | None, selected_BNH: Tensor, gates_BNH: Tensor | None
) -> Tensor:
    """One product for the rows of each head, added to the rows of the result."""
    batch, tokens, _ = selected_BNH.shape
    out_HRD, selected_HR = out_BHND.transpose(0, 1).flatten(1, 2), selected_BNH.flatten(0, 1).T
    y_RC = out_BHND.new_zeros(batch * tokens, weight_HDC.shape[2])
    for head, weight_DC in enumerate(weight_HDC.unbind()):
        row_M = selected_HR[head].nonzero().squeeze(1)
        out_MD = out_HRD[head].index_select(0, row_M)
        if gates_BNH is not None:
            gate_M = gates_BNH.flatten(0, 1)[:, head].index_select(0, row_M)
            out_MD = out_MD * gate_M.unsqueeze(1).to(out_MD.dtype)
        y_RC.index_add_(0, row_M, out_MD @ weight_DC)
    y_BNC = y_RC.unflatten(0, (batch, tokens))
    return y_BNC if bias_C is None else y_BNC + bias_C


ENGINE = Engine("gathered", Projections(to_heads, from_heads))
