"""The stock kernel on all heads, then the gates: what every machine has, and what sparsity has to beat."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixhead.ops.masks import with_causal


def attend(
    q_BHND: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    gates_BNH: Tensor,
    selected_BNH: Tensor,
    *,
    causal: bool,
    scale: float,
    attn_mask: Tensor | None,
) -> Tensor:
    """`F.scaled_dot_product_attention` of every head, then gated; same result as the reference, no N x T tensor."""
    selected_BHN1 = selected_BNH.transpose(1, 2).unsqueeze(-1)
    tensors = (q_BHND, k_BKTD, v_BKTD, gates_BNH)
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if differentiable:
        # Rows that nobody reads are cleared: the gradient of a NaN that is masked later is NaN all the same.
        q_BHND = q_BHND.masked_fill(~selected_BHN1, 0.0)
    num_queries, num_keys = q_BHND.shape[2], k_BKTD.shape[2]
    is_causal = causal and attn_mask is None and num_queries == num_keys
    if causal and not is_causal:
        attn_mask = with_causal(attn_mask, num_queries, num_keys, q_BHND.device)
    out_BHND = F.scaled_dot_product_attention(
        q_BHND,
        k_BKTD,
        v_BKTD,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q_BHND.shape[1] != k_BKTD.shape[1],
    )
    gates_BHN1 = gates_BNH.transpose(1, 2).unsqueeze(-1)
    if differentiable:
        return torch.where(selected_BHN1, out_BHND * gates_BHN1, 0.0)
    # In place: without a gradient two copies less.
    return out_BHND.mul_(gates_BHN1).masked_fill_(~selected_BHN1, 0.0)
