"""What stands in for the output of a head at tokens that skip it: a constant vector for every head.

Shape legend: B batch, N tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixhead.ops.cpu.usable import transformed
from mixhead.routing.one_operator import is_loaded

NAME = "mixhead::fill_skipped_cpu"
torch.library.define(NAME, "(Tensor(a!) out, Tensor selected, Tensor skipped) -> ()")
FILL = torch.ops.mixhead.fill_skipped_cpu.default


@torch.library.register_fake(NAME)
def fill_fake(out: Tensor, selected: Tensor, skipped: Tensor) -> None:
    """Nothing is returned: `out` is written to."""


def fill_skipped(gated_BNHD: Tensor, selected_BNH: Tensor, skipped_HD: Tensor) -> Tensor:
    """The heads' outputs, with the constant of a head where a token skips it.

    Args:
        gated_BNHD: heads' outputs times their gates; written to where nobody differentiates.
        selected_BNH: bool, which heads each token uses.
        skipped_HD: the constants, in any floating dtype.

    Returns:
        [B, N, H, D] in the dtype of `gated_BNHD`, contiguous.
    """
    skipped_HD = skipped_HD if skipped_HD.dtype == gated_BNHD.dtype else skipped_HD.to(gated_BNHD.dtype)
    if can_fill(gated_BNHD, selected_BNH, skipped_HD):
        FILL(gated_BNHD, selected_BNH, skipped_HD)
        return gated_BNHD
    return torch.where(selected_BNH.unsqueeze(-1), gated_BNHD, skipped_HD).contiguous()


def can_fill(gated_BNHD: Tensor, selected_BNH: Tensor, skipped_HD: Tensor) -> bool:
    """Whether the operator is loaded, and nothing is asked of it but numbers: no gradient, no transformation."""
    return (
        not torch.compiler.is_compiling()
        and is_loaded()
        and not torch.is_grad_enabled()
        and type(gated_BNHD) is Tensor
        and gated_BNHD.is_cpu
        and gated_BNHD.is_contiguous()
        and selected_BNH.is_contiguous()
        and skipped_HD.is_contiguous()
        and not transformed()
    )
