"""A loop over the experts: portable PyTorch with any derivative.

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
    """One product for the rows of each expert."""
    slots, width = expert_BNS.shape[2], weight_EDC.shape[1]
    hidden_RC, expert_J = hidden_BNC.flatten(0, 1), expert_BNS.flatten()
    places, results = [], []
    for expert, weight_DC in enumerate(weight_EDC.unbind()):
        place_M = (expert_J == expert).nonzero().squeeze(1)
        places.append(place_M)
        results.append(F.linear(hidden_RC.index_select(0, place_M // slots), weight_DC))
    empty_JD = hidden_BNC.new_zeros(expert_J.shape[0], width)
    return empty_JD.index_copy(0, torch.cat(places), torch.cat(results)).view(*expert_BNS.shape, width)


def from_slots(out_BNSD: Tensor, weight_EDC: Tensor, expert_BNS: Tensor, gates_BNS: Tensor | None) -> Tensor:
    """One product for the rows of each expert, added to the rows of the result."""
    batch, tokens, slots = expert_BNS.shape
    if gates_BNS is not None:
        out_BNSD = out_BNSD * gates_BNS.to(out_BNSD.dtype).unsqueeze(-1)
    out_JD, expert_J = out_BNSD.flatten(0, 2), expert_BNS.flatten()
    y_RC = out_BNSD.new_zeros(batch * tokens, weight_EDC.shape[2])
    for expert, weight_DC in enumerate(weight_EDC.unbind()):
        place_M = (expert_J == expert).nonzero().squeeze(1)
        y_RC = y_RC.index_add(0, place_M // slots, out_JD.index_select(0, place_M) @ weight_DC)
    return y_RC.unflatten(0, (batch, tokens))


ENGINE = Engine("gathered", SlotProjections(to_slots, from_slots))
