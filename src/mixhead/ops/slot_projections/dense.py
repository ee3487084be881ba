"""One product over all experts: what sparsity has to beat.

Shape legend: B batch, N tokens, R = B N rows, C hidden size, E experts, S slots, D width of an expert, J = R S places,
M rows that chose one expert. An expert index of E means that a slot is empty, as at padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixhead.ops.engine import Engine
from mixhead.ops.slot_projections.engine import SlotProjections


def to_slots(hidden_BNC: Tensor, weight_EDC: Tensor, expert_BNS: Tensor) -> Tensor:
    """`F.linear` to all experts, then those that stand in the slots."""
    experts, width, _ = weight_EDC.shape
    all_BNED = F.linear(hidden_BNC, weight_EDC.flatten(0, 1)).unflatten(-1, (experts, width))
    index_BNSD = expert_BNS.clamp(max=experts - 1).unsqueeze(-1).expand(-1, -1, -1, width)
    return torch.where((expert_BNS < experts).unsqueeze(-1), all_BNED.gather(2, index_BNSD), 0.0)


def from_slots(out_BNSD: Tensor, weight_EDC: Tensor, expert_BNS: Tensor, gates_BNS: Tensor | None) -> Tensor:
    """The slots at the places of their experts among zeros, then `F.linear` from all experts."""
    experts, width, _ = weight_EDC.shape
    if gates_BNS is not None:
        out_BNSD = out_BNSD * gates_BNS.to(out_BNSD.dtype).unsqueeze(-1)
    filled_BNS1 = (expert_BNS < experts).unsqueeze(-1)
    index_BNSD = expert_BNS.clamp(max=experts - 1).unsqueeze(-1).expand(-1, -1, -1, width)
    zeros_BNED = out_BNSD.new_zeros(*expert_BNS.shape[:2], experts, width)
    all_BNED = zeros_BNED.scatter_add(2, index_BNSD, torch.where(filled_BNS1, out_BNSD, 0.0))
    return F.linear(all_BNED.flatten(2), weight_EDC.permute(2, 0, 1).flatten(1))


ENGINE = Engine("dense", SlotProjections(to_slots, from_slots))
