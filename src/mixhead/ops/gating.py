"""The gates of heads that have all been computed: their outputs times the gates, and zero where a token skips a head.

Shape legend: B batch, N tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixhead.ops.cpu.usable import transformed
from mixhead.routing.one_operator import DTYPES, is_loaded

NAME = "mixhead::gate_heads_cpu"
torch.library.define(NAME, "(Tensor(a!) out, Tensor gates, Tensor selected) -> ()")
GATE = torch.ops.mixhead.gate_heads_cpu.default


@torch.library.register_fake(NAME)
def gate_fake(out: Tensor, gates: Tensor, selected: Tensor) -> None:
    """Nothing is returned: `out` is written to."""


def gate_heads_(out_BHND: Tensor, gates_BNH: Tensor, selected_BNH: Tensor) -> Tensor:
    """Gates heads' outputs in place, where nobody differentiates: one pass over them instead of two, and no copy.

    Args:
        out_BHND: written to, and returned; NaN at heads that are not selected becomes zero.
        gates_BNH: in the same dtype.
        selected_BNH: bool.
    """
    if can_gate(out_BHND, gates_BNH, selected_BNH):
        GATE(out_BHND, gates_BNH, selected_BNH)
        return out_BHND
    skipped_BHN1 = ~selected_BNH.transpose(1, 2).unsqueeze(-1)
    return out_BHND.mul_(gates_BNH.transpose(1, 2).unsqueeze(-1)).masked_fill_(skipped_BHN1, 0.0)


def can_gate(out_BHND: Tensor, gates_BNH: Tensor, selected_BNH: Tensor) -> bool:
    """Whether the operator is loaded, and nothing is asked of it but numbers."""
    return (
        not torch.compiler.is_compiling()
        and is_loaded()
        and type(out_BHND) is Tensor
        and out_BHND.is_cpu
        and gates_BNH.is_cpu
        and selected_BNH.is_cpu
        and out_BHND.dtype in DTYPES
        and gates_BNH.dtype == out_BHND.dtype
        and out_BHND.stride(3) == 1
        and not transformed()
    )
