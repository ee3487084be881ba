"""The masked mathematics, one line a step.

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
    """Every expert on every token, then those that stand in the slots."""
    return torch.einsum("bnc,edc,bnse->bnsd", hidden_BNC, weight_EDC, chosen_BNSE(expert_BNS, weight_EDC))


def from_slots(out_BNSD: Tensor, weight_EDC: Tensor, expert_BNS: Tensor, gates_BNS: Tensor | None) -> Tensor:
    """Every expert on every slot, those that do not stand in it times 0."""
    chosen = chosen_BNSE(expert_BNS, weight_EDC)
    if gates_BNS is not None:
        chosen = chosen * gates_BNS.to(chosen.dtype).unsqueeze(-1)
    filled_BNS1 = (expert_BNS < len(weight_EDC)).unsqueeze(-1)
    return torch.einsum("bnsd,bnse,edc->bnc", torch.where(filled_BNS1, out_BNSD, 0.0), chosen, weight_EDC)


def chosen_BNSE(expert_BNS: Tensor, weight_EDC: Tensor) -> Tensor:
    """1 at the expert of each slot, in the dtype of the weights."""
    return F.one_hot(expert_BNS, len(weight_EDC) + 1)[..., :-1].to(weight_EDC.dtype)


ENGINE = Engine("reference", SlotProjections(to_slots, from_slots))
