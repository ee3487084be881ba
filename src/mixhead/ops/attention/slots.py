"""Slots: where every token uses equally many heads of each key-value group, they pack into fewer query heads.

Slot s of a group holds, for every token, the query of its s-th selected head. Queries keep their places in the
sequence and every head of a group attends to the same keys, so the stock kernel runs on fewer heads, unchanged, with
its causal and grouped-query flags. Any device, any dtype, any gradient.

Shape legend: B batch, N queries, T keys, K key-value heads, G query heads of one group, S slots of one group, D head
dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixhead.ops.engine import Engine, Mask
from mixhead.ops.rows import selected_first
from mixhead.ops.stock import stock_attention
from mixhead.routing import Routing


def unpackable(selected_BNH: Tensor, kv_heads: int, heads_per_group: int | None) -> str | None:
    """Why the heads do not pack into slots, in a sentence; None where they do.

    A promised `heads_per_group` is believed where counting would break a graph or make a device wait for the host.
    """
    if torch.compiler.is_compiling() and heads_per_group is None:
        return "torch.compile must know the number of slots: give routing.heads_per_group, as balanced routers do"
    if heads_per_group is not None and (torch.compiler.is_compiling() or selected_BNH.device.type != "cpu"):
        return None
    if selected_BNH.numel() == 0:
        return None
    least, most = (int(count) for count in selected_BNH.unflatten(-1, (kv_heads, -1)).sum(-1).aminmax())
    if least != most:
        return (
            f"tokens select between {least} and {most} heads of one key-value group, and packing needs one number for "
            f"all tokens and all {kv_heads} groups: use a group-balanced router or another impl"
        )
    if heads_per_group not in (None, least):
        return f"the routing promises {heads_per_group} heads in each key-value group, but tokens select {least}"
    return None


def refusal(q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing, attn_mask: Tensor | None) -> str | None:
    """Why the heads of this routing do not pack into slots, in a sentence; None where they do."""
    kv_heads = k_BKTD.shape[1]
    return unpackable(routing.selected_BNH, kv_heads, routing.slots(kv_heads))


def attend(
    q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing, *, causal: bool, scale: float, attn_mask: Mask
) -> Tensor:
    """Each selected head's attention times its gate, computed in S slots of every group, as many as were promised.

    Without a promise they are counted at the first token, for which a device waits for the host. `refusal` must be
    None: of a token that selects more heads than there are slots, some would be missing.
    """
    gates_BNH, selected_BNH = routing.gates_BNH, routing.selected_BNH
    kv_heads = k_BKTD.shape[1]
    heads_per_group = routing.slots(kv_heads)
    selected_BKNG = by_group(selected_BNH, kv_heads)
    if heads_per_group is None:
        heads_per_group = int(selected_BKNG[0, 0, 0].sum())
    if heads_per_group == 0:  # one slot is computed all the same, of nothing, and dropped at the end
        q_BHND, k_BKTD, v_BKTD = (
            torch.where(t.new_zeros((), dtype=torch.bool), t, 0) for t in (q_BHND, k_BKTD, v_BKTD)
        )
    head_BKNS = selected_first(selected_BKNG)[..., : max(heads_per_group, 1)]

    q_BKGND = q_BHND.unflatten(1, (kv_heads, -1))
    index_BKSND = head_BKNS.transpose(2, 3).unsqueeze(-1).expand(-1, -1, -1, -1, q_BHND.shape[-1])
    packed_BJND = q_BKGND.gather(2, index_BKSND).flatten(1, 2)  # J = K * S query heads
    if attn_mask is not None and attn_mask.shape[1] > 1:
        attn_mask = mask_of_slots(attn_mask, head_BKNS)
    out_BJND = stock_attention(packed_BJND, k_BKTD, v_BKTD, causal=causal, scale=scale, attn_mask=attn_mask)
    gate_BKSN1 = by_group(gates_BNH, kv_heads).gather(-1, head_BKNS).transpose(2, 3).unsqueeze(-1)
    used_BKSN1 = selected_BKNG.gather(-1, head_BKNS).transpose(2, 3).unsqueeze(-1)
    out_BKSND = torch.where(used_BKSN1, out_BJND.unflatten(1, (kv_heads, -1)) * gate_BKSN1, 0.0)
    return torch.zeros_like(q_BKGND, dtype=out_BKSND.dtype).scatter(2, index_BKSND, out_BKSND).flatten(1, 2)


def by_group(x_BNH: Tensor, kv_heads: int) -> Tensor:
    """Heads sorted into their key-value groups: [B, N, H] to [B, K, N, G]."""
    return x_BNH.unflatten(-1, (kv_heads, -1)).transpose(1, 2)


def mask_of_slots(attn_mask: Tensor, head_BKNS: Tensor) -> Tensor:
    """The rows that the queries in the slots have in a mask that differs between heads: [B, J, N, T or 1]."""
    batch, kv_heads, num_queries, _ = head_BKNS.shape
    mask_BKGNX = attn_mask.expand(batch, -1, num_queries, -1).unflatten(1, (kv_heads, -1))
    index_BKSNX = head_BKNS.transpose(2, 3).unsqueeze(-1).expand(-1, -1, -1, -1, attn_mask.shape[-1])
    return mask_BKGNX.gather(2, index_BKSNX).flatten(1, 2)


ENGINE = Engine("slots", attend, refusal)
