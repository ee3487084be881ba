"""The stock kernel on all heads, then the gates: what every machine has, and what sparsity has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from mixhead.ops.engine import Engine, Mask
from mixhead.ops.gating import gate_heads_
from mixhead.ops.stock import stock_attention
from mixhead.routing import Routing


def attend(
    q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing, *, causal: bool, scale: float, attn_mask: Mask
) -> Tensor:
    """`F.scaled_dot_product_attention` of every head, then gated; same result as the reference, no N x T tensor."""
    gates_BNH, selected_BNH = routing.gates_BNH, routing.selected_BNH
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHND, k_BKTD, v_BKTD, gates_BNH))):
        out_BHND = stock_attention(q_BHND, k_BKTD, v_BKTD, causal=causal, scale=scale, attn_mask=attn_mask)
        return gate_heads_(out_BHND, gates_BNH, selected_BNH)
    # What nobody reads is cleared: the gradient of a NaN that is masked later is NaN all the same.
    selected_BHN1 = selected_BNH.transpose(1, 2).unsqueeze(-1)
    q_BHND = q_BHND.masked_fill(~selected_BHN1, 0.0)
    gates_BNH = gates_BNH.masked_fill(~selected_BNH, 0.0)
    out_BHND = stock_attention(q_BHND, k_BKTD, v_BKTD, causal=causal, scale=scale, attn_mask=attn_mask)
    return torch.where(selected_BHN1, out_BHND * gates_BNH.transpose(1, 2).unsqueeze(-1), 0.0)


ENGINE = Engine("dense", attend)
