"""Portable PyTorch: the window is walked place by place over shifted views of the map, so that nothing is unfolded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixhead.ops.aggregated.arguments import AggregatedArguments


def attend(a: AggregatedArguments) -> Tensor:
    """Aggregated attention of all heads, then the gates: [B, H, N, D]."""
    q_BHND = a.unit_queries_BHND()
    scaled_BHND = a.scaled_queries_BHND(q_BHND)
    scaled_BHYXD = scaled_BHND.unflatten(2, a.size)
    k_views = shifted(F.normalize(a.k_BHND, dim=-1).unflatten(2, a.size), a.window)
    local_BHNL = torch.stack([(scaled_BHYXD * k_BHYXD).sum(-1).flatten(2) for k_BHYXD in k_views], -1)
    local_BHNL = (local_BHNL + a.local_bias_HL.unsqueeze(1)).masked_fill(outside_NL(a), -torch.inf)
    pooled_BHNT = scaled_BHND @ F.normalize(a.k_BHTD, dim=-1).mT + a.pool_bias.pairs_HNT()
    weights_BHNA = torch.cat([local_BHNL, pooled_BHNT], -1).softmax(-1)
    local_BHNL, pooled_BHNT = weights_BHNA.split([local_BHNL.shape[-1], pooled_BHNT.shape[-1]], -1)
    local_BHNL = local_BHNL + q_BHND @ a.learnable_tokens_HDL + a.learnable_bias_HL.unsqueeze(1)
    heads_BHND = pooled_BHNT @ a.v_BHTD
    local_BHYXL = local_BHNL.unflatten(2, a.size)
    for place, v_BHYXD in enumerate(shifted(a.v_BHND.unflatten(2, a.size), a.window)):
        heads_BHND = heads_BHND + (local_BHYXL[..., place, None] * v_BHYXD).flatten(2, 3)
    return a.gated(heads_BHND)


def shifted(map_BHYXD: Tensor, window: int) -> list[Tensor]:
    """The map as each place of the window sees it, zero beyond its edges: L views of one padded copy."""
    rows, columns = map_BHYXD.shape[2:4]
    reach = window // 2
    padded = F.pad(map_BHYXD, (0, 0, reach, reach, reach, reach))
    return [padded[:, :, y : y + rows, x : x + columns] for y in range(window) for x in range(window)]


def outside_NL(a: AggregatedArguments) -> Tensor:
    """bool, True at the places of a query's window that lie beyond the edges of the map."""
    inside_11YX1 = torch.ones(1, 1, *a.size, 1, dtype=torch.bool, device=a.q_BHND.device)
    return torch.stack([~view.flatten() for view in shifted(inside_11YX1, a.window)], -1)
