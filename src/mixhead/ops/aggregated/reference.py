"""The mathematics in the plain form: every window is unfolded, which copies keys and values L times.

It defines what every other implementation has to compute, and is what they are measured against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixhead.ops.aggregated.arguments import AggregatedArguments


def attend(a: AggregatedArguments) -> Tensor:
    """Aggregated attention of all heads, then the gates: [B, H, N, D]."""
    q_BHND = a.unit_queries_BHND()
    scaled_BHND = a.scaled_queries_BHND(q_BHND)
    k_BHNDL = unfold(F.normalize(a.k_BHND, dim=-1), a.size, a.window)
    v_BHNDL = unfold(a.v_BHND, a.size, a.window)
    inside_NL = unfold(torch.ones_like(a.v_BHND[:1, :1, :, :1]), a.size, a.window)[0, 0, :, 0] > 0
    local_BHNL = (scaled_BHND.unsqueeze(-2) @ k_BHNDL).squeeze(-2) + a.local_bias_HL.unsqueeze(1)
    local_BHNL = local_BHNL.masked_fill(~inside_NL, -torch.inf)
    pooled_BHNT = scaled_BHND @ F.normalize(a.k_BHTD, dim=-1).mT + a.pool_bias.pairs_HNT()
    weights_BHNA = torch.cat([local_BHNL, pooled_BHNT], -1).softmax(-1)
    local_BHNL, pooled_BHNT = weights_BHNA.split([local_BHNL.shape[-1], pooled_BHNT.shape[-1]], -1)
    local_BHNL = local_BHNL + q_BHND @ a.learnable_tokens_HDL + a.learnable_bias_HL.unsqueeze(1)
    heads_BHND = (v_BHNDL @ local_BHNL.unsqueeze(-1)).squeeze(-1) + pooled_BHNT @ a.v_BHTD
    return a.gated(heads_BHND)


def unfold(map_BHND: Tensor, size: tuple[int, int], window: int) -> Tensor:
    """What every place sees in its window, zero outside of the map: [B, H, N, D] -> [B, H, N, D, L]."""
    batch, heads, tokens, head_dim = map_BHND.shape
    map_BCYX = map_BHND.transpose(-1, -2).reshape(batch, heads * head_dim, *size)
    seen_BHDLN = F.unfold(map_BCYX, window, padding=window // 2).view(batch, heads, head_dim, -1, tokens)
    return seen_BHDLN.permute(0, 1, 4, 2, 3)
