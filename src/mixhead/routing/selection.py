"""Top-k selection of heads from scores."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_mask(scores_BNH: Tensor, k: int) -> Tensor:
    """bool mask of the k largest scores of every token; exactly k are True, also where scores tie."""
    mask_BNH = torch.zeros_like(scores_BNH, dtype=torch.bool)
    if k == 0:
        return mask_BNH
    # 1, since torch.jit.trace knows no scatter of True.
    return mask_BNH.scatter(-1, scores_BNH.topk(k, dim=-1).indices, 1)


def grouped_top_k_mask(scores_BNH: Tensor, k: int, num_groups: int) -> Tensor:
    """The same number of heads in every group: k heads in all, k / num_groups of each run of H / num_groups heads.

    With grouped-query attention and one group per key-value head, the selected heads then pack into fewer query heads
    without moving any key or value.
    """
    scores_BNGX = scores_BNH.unflatten(-1, (num_groups, -1))
    return top_k_mask(scores_BNGX, k // num_groups).flatten(-2)
