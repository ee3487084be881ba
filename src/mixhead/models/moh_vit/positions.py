"""Relative positions of queries and pooled keys, computed for any size of the map.

Shape legend: Y, X rows and columns of queries; U, V rows and columns of pooled keys; R, S different distances along the
two axes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]

# Distances are measured in eighths of the trained map and squeezed by a logarithm, as in Swin V2.
RANGE = 8.0


@dataclass(frozen=True, eq=False)
class RelativePositions:
    """The different distances between queries and keys, and which of them each pair has.

    Attributes:
        distances_RS2: float32, the vertical and horizontal distance of every combination, on the logarithmic scale.
        row_YU: int64, index of the vertical distance.
        column_XV: int64, index of the horizontal distance.
    """

    distances_RS2: Tensor
    row_YU: Tensor
    column_XV: Tensor


@functools.lru_cache(maxsize=32)
def relative_positions(queries: Size, keys: Size, trained: Size, device: torch.device) -> RelativePositions:
    """Positions for a map of queries, the map of pooled keys over it, and the map that the model was trained on."""
    row_R, row_YU = axis(queries[0], keys[0], trained[0])
    column_S, column_XV = axis(queries[1], keys[1], trained[1])
    grid_RS2 = torch.stack(torch.meshgrid(row_R, column_S, indexing="ij"), -1)
    return RelativePositions(grid_RS2.to(device), row_YU.to(device), column_XV.to(device))


def axis(queries: int, keys: int, trained: int) -> tuple[Tensor, Tensor]:
    """The different distances along one axis, and the index of each pair's among them."""
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        position_Q = torch.arange(queries, dtype=torch.float32)
        center_K = F.adaptive_avg_pool1d(position_Q.unsqueeze(0), keys).squeeze(0)
        # A trained map of one token has no distances to measure in.
        distance_QK = (position_Q.unsqueeze(1) - center_K) / max(trained - 1, 1) * RANGE
        distance, index_QK = torch.unique(distance_QK, return_inverse=True)
        return distance.sign() * torch.log2(distance.abs() + 1.0) / math.log2(RANGE), index_QK
