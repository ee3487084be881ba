"""FlexAttention as the engine: queries that select a head come first, and blocks without any are skipped.

The queries of every head are sorted, the selected ones first, each part in the order of its positions. A `BlockMask`
made of device tensors tells how many blocks of keys each block of sorted queries attends to: none where nothing is
selected, and under the causal rule only those that its last query may see. So the host never waits for a count.

On a CUDA device FlexAttention is compiled, by `torch.compile`. On the CPU it runs as PyTorch's own reference of it: it
holds the scores of all heads, skips nothing, and has no gradient.

Shape legend: B batch, N queries, T keys, H query heads, K key-value heads, D head dim, Q blocks of queries, Y blocks of
keys; M the sorted queries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mixhead.ops.engine import Engine, Mask
from mixhead.ops.rows import selected_first
from mixhead.routing import Routing

BLOCK = 128


def refusal(q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing, attn_mask: Tensor | None) -> str | None:
    """Why FlexAttention cannot take these arguments, in a sentence; None where it can."""
    if q_BHND.device.type not in ("cuda", "cpu"):
        return f"FlexAttention runs on CUDA devices and on the CPU, and the queries are on {q_BHND.device.type}"
    if attn_mask is not None and attn_mask.requires_grad:
        return "this use of FlexAttention has no gradient of the mask"
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q_BHND, k_BKTD, v_BKTD))
    if q_BHND.device.type == "cpu" and wants_gradient:
        return "FlexAttention has no gradient on the CPU: call it under torch.no_grad(), or take another impl"
    return None


def attend(
    q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing, *, causal: bool, scale: float, attn_mask: Mask
) -> Tensor:
    """Each selected head's attention times its gate. `refusal` must be None."""
    gates_BNH, selected_BNH = routing.gates_BNH, routing.selected_BNH
    if not torch.is_grad_enabled():  # FlexAttention looks at requires_grad alone.
        q_BHND, k_BKTD, v_BKTD = q_BHND.detach(), k_BKTD.detach(), v_BKTD.detach()
    num_keys = k_BKTD.shape[2]
    selected_BHN = selected_BNH.transpose(1, 2)
    position_BHM = selected_first(selected_BHN)
    used_BHM1 = selected_BHN.gather(2, position_BHM).unsqueeze(-1)
    index_BHMD = position_BHM.unsqueeze(-1).expand_as(q_BHND)
    # What is not selected may hold NaN, which a gradient of 0 would not stop.
    sorted_BHMD = torch.where(used_BHM1, q_BHND.gather(2, index_BHMD), 0.0)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q_BHND.shape[:3], num_keys)
    out_BHMD = engine(q_BHND.device.type)(
        sorted_BHMD,
        k_BKTD,
        v_BKTD,
        score_mod=None if attn_mask is None or attn_mask.dtype == torch.bool else add(attn_mask, position_BHM),
        block_mask=blocks(selected_BHN, position_BHM, num_keys, causal, attn_mask),
        scale=scale,
        enable_gqa=q_BHND.shape[1] != k_BKTD.shape[1],
    )
    gate_BHM1 = gates_BNH.transpose(1, 2).gather(2, position_BHM).unsqueeze(-1)
    out_BHMD = torch.where(used_BHM1, out_BHMD * gate_BHM1, 0.0)
    return torch.zeros_like(q_BHND, dtype=out_BHMD.dtype).scatter(2, index_BHMD, out_BHMD)


def engine(device_type: str) -> Any:
    """FlexAttention, compiled where that gives a kernel and nobody compiles it already."""
    return flex_attention if device_type == "cpu" or torch.compiler.is_compiling() else compiled()


@functools.cache
def compiled() -> Any:
    """FlexAttention through `torch.compile`, once per process."""
    return torch.compile(flex_attention)


def add(bias_BHNT: Tensor, position_BHM: Tensor) -> Callable[..., Tensor]:
    """The scores of the sorted queries, plus what the mask adds to each."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, m: Tensor, t: Tensor) -> Tensor:
        return score + bias_BHNT[b, h, position_BHM[b, h, m], t]

    return score_mod


def blocks(
    selected_BHN: Tensor, position_BHM: Tensor, num_keys: int, causal: bool, attn_mask: Tensor | None
) -> BlockMask:
    """Which blocks of keys each block of sorted queries attends to, and the mask within them."""
    num_queries = position_BHM.shape[2]
    device = position_BHM.device
    end_BH1 = selected_BHN.sum(-1, keepdim=True)
    start_Q = torch.arange(0, num_queries, BLOCK, device=device)
    seen_BHQ = torch.full((*position_BHM.shape[:2], len(start_Q)), num_keys, device=device)
    if causal:  # The last query of a block sees the most.
        last_BHQ = torch.minimum(start_Q + BLOCK, end_BH1).sub(1).clamp(min=0)
        seen_BHQ = (position_BHM.gather(2, last_BHQ) + 1 + num_keys - num_queries).clamp(min=0)
    seen_BHQ = torch.where(start_Q < end_BH1, seen_BHQ, 0)
    count_BHQ = ((seen_BHQ + BLOCK - 1) // BLOCK).to(torch.int32)
    block_Y = torch.arange(-(-num_keys // BLOCK), dtype=torch.int32, device=device)
    index_BHQY = block_Y.expand(*count_BHQ.shape, -1).contiguous()
    return BlockMask.from_kv_blocks(
        count_BHQ,
        index_BHQY,
        BLOCK_SIZE=BLOCK,
        mask_mod=allowed(position_BHM, num_keys - num_queries, causal, attn_mask),
        seq_lengths=(num_queries, num_keys),
    )


def allowed(position_BHM: Tensor, offset: int, causal: bool, attn_mask: Tensor | None) -> Callable[..., Any] | None:
    """Whether a sorted query may attend to a key; None where each may attend to all."""
    mask_BHNT = attn_mask if attn_mask is not None and attn_mask.dtype == torch.bool else None

    def sees(b: Tensor, h: Tensor, m: Tensor, t: Tensor) -> Tensor:
        return t <= position_BHM[b, h, m] + offset

    def passes(b: Tensor, h: Tensor, m: Tensor, t: Tensor) -> Tensor:
        assert mask_BHNT is not None
        return mask_BHNT[b, h, position_BHM[b, h, m], t]

    def both(b: Tensor, h: Tensor, m: Tensor, t: Tensor) -> Tensor:
        return sees(b, h, m, t) & passes(b, h, m, t)

    if mask_BHNT is None:
        return sees if causal else None
    return both if causal else passes


ENGINE = Engine("flex", attend, refusal)
