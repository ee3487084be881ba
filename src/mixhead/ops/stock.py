"""PyTorch's own attention, with the causal convention of this room: what several implementations are built on."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mixhead.ops.masks import with_causal


def stock_attention(
    q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, *, causal: bool, scale: float, attn_mask: Tensor | None
) -> Tensor:
    """`F.scaled_dot_product_attention` of all the heads given, [B, H, N, D]; grouped where K is below H."""
    num_queries, num_keys = q_BHND.shape[2], k_BKTD.shape[2]
    # Branches, since torch.compile may hold sizes as symbols, and the stock kernel takes no symbol for a flag.
    is_causal = enable_gqa = False
    if q_BHND.shape[1] != k_BKTD.shape[1]:
        enable_gqa = True
    if causal and attn_mask is None and num_queries == num_keys:
        is_causal = True
    elif causal:
        attn_mask = with_causal(attn_mask, num_queries, num_keys, q_BHND.device)
    return F.scaled_dot_product_attention(
        q_BHND, k_BKTD, v_BKTD, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
