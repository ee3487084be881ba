"""Portable PyTorch: the queries that select a head are gathered, so that the others cost nothing.

The gathered queries of every head stand behind each other in the order of their positions, padded to the largest count.
Without a mask the stock kernel takes them in one call. With one (a causal mask is one here, since gathered queries are
no longer consecutive) they go through in blocks, each block against the keys that any of its queries may see, so that
no N x T tensor exists (the gradient keeps the masks of all blocks, which together are that large).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixhead.ops.engine import Engine, Mask
from mixhead.ops.rows import selected_first
from mixhead.ops.stock import stock_attention
from mixhead.routing import Routing

QUERIES_PER_BLOCK = 256


def attend(
    q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing, *, causal: bool, scale: float, attn_mask: Mask
) -> Tensor:
    """Each selected head's attention times its gate; heads that are not selected are not computed."""
    gates_BNH, selected_BNH = routing.gates_BNH, routing.selected_BNH
    selected_BHN = selected_BNH.transpose(1, 2)
    capacity = max(int(selected_BHN.sum(-1).max()), 1)
    position_BHM = selected_first(selected_BHN)[..., :capacity]
    index_BHMD = position_BHM.unsqueeze(-1).expand(-1, -1, -1, q_BHND.shape[-1])
    used_BHM1 = selected_BHN.gather(2, position_BHM).unsqueeze(-1)
    # Heads with fewer rows are filled up with rows that nobody reads; their NaN would reach the gradients.
    gathered_BHMD = q_BHND.gather(2, index_BHMD).masked_fill(~used_BHM1, 0.0)
    if causal or attn_mask is not None:
        out_BHMD = attend_in_blocks(
            gathered_BHMD, k_BKTD, v_BKTD, position_BHM, q_BHND.shape[2], causal, scale, attn_mask
        )
    else:
        out_BHMD = stock_attention(gathered_BHMD, k_BKTD, v_BKTD, causal=False, scale=scale, attn_mask=None)
    gate_BHM1 = gates_BNH.transpose(1, 2).gather(2, position_BHM).unsqueeze(-1).masked_fill(~used_BHM1, 0.0)
    out_BHMD = torch.where(used_BHM1, out_BHMD * gate_BHM1, 0.0)
    return torch.zeros_like(q_BHND, dtype=out_BHMD.dtype).scatter(2, index_BHMD, out_BHMD)


def attend_in_blocks(
    gathered_BHMD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    position_BHM: Tensor,
    num_queries: int,
    causal: bool,
    scale: float,
    attn_mask: Tensor | None,
) -> Tensor:
    """Attention of gathered queries under a mask, block by block."""
    num_keys = k_BKTD.shape[2]
    blocks = []
    for start in range(0, gathered_BHMD.shape[2], QUERIES_PER_BLOCK):
        block = slice(start, start + QUERIES_PER_BLOCK)
        position_BHX = position_BHM[:, :, block]
        visible = int(position_BHX.max()) + 1 + num_keys - num_queries if causal else num_keys
        mask_BHXT = block_mask(position_BHX, num_queries, num_keys, max(visible, 1), causal, attn_mask)
        k_BKVD, v_BKVD = k_BKTD[:, :, : max(visible, 1)], v_BKTD[:, :, : max(visible, 1)]
        q_BHXD = gathered_BHMD[:, :, block]
        blocks.append(stock_attention(q_BHXD, k_BKVD, v_BKVD, causal=False, scale=scale, attn_mask=mask_BHXT))
    return torch.cat(blocks, 2)


def block_mask(
    position_BHX: Tensor, num_queries: int, num_keys: int, visible: int, causal: bool, attn_mask: Tensor | None
) -> Tensor:
    """The mask rows of the gathered queries, over the first `visible` keys: [B, H, X, visible]."""
    key_V = torch.arange(visible, device=position_BHX.device)
    causal_BHXV = key_V <= position_BHX.unsqueeze(-1) + (num_keys - num_queries)
    if attn_mask is None:
        return causal_BHXV
    batch, heads = position_BHX.shape[:2]
    rows_BHNV = attn_mask.expand(batch, heads, num_queries, num_keys)[..., :visible]
    rows_BHXV = rows_BHNV.gather(2, position_BHX.unsqueeze(-1).expand(-1, -1, -1, visible))
    if not causal:
        return rows_BHXV
    if rows_BHXV.dtype == torch.bool:
        return rows_BHXV & causal_BHXV
    return rows_BHXV.masked_fill(~causal_BHXV, -torch.inf)


ENGINE = Engine("gathered", attend)
