"""`ScoreProjection`: how routers turn hidden states into scores.

Shape legend: B batch, N tokens, C hidden size, E scores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScoreProjection(nn.Linear):
    """A linear layer that computes at least in float32, whatever the dtype of the model or of autocast.

    In half precision near-equal scores tie, and the choice would depend on how a text was cut into batches. The layer
    itself computes so, and is called: then hooks that bring its weights, and adapters around it, do their work.
    """

    def forward(self, input: Tensor) -> Tensor:  # named so in the base class
        """[B, N, C] to [B, N, E], at least in float32."""
        dtype = torch.promote_types(input.dtype, torch.float32)
        if type(self.weight) not in (nn.Parameter, Tensor):  # Quantised: only the weight knows how it multiplies.
            return super().forward(input).to(dtype)
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(input.to(dtype), self.weight.to(dtype), bias)


def scores_of(proj: nn.Module, hidden_BNC: Tensor) -> Tensor:
    """What a router's projection says, at least in float32; it may have been wrapped or replaced since it was made."""
    scores_BNE: Tensor = proj(hidden_BNC)
    return scores_BNE.to(torch.promote_types(hidden_BNC.dtype, torch.float32))
