"""Lists of what is selected, in the forms that the implementations need; made on the device, without the host."""

from __future__ import annotations

import torch
from torch import Tensor


def selected_first(selected: Tensor) -> Tensor:
    """Positions along the last axis, the selected ones first, each part in rising order: int64."""
    rank = selected.cumsum(-1)
    position = torch.arange(selected.shape[-1], device=selected.device).expand_as(rank)
    place = torch.where(selected, rank - 1, rank[..., -1:] + position - rank)
    return torch.empty_like(position).scatter(-1, place, position)
