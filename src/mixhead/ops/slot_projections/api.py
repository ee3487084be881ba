"""`project_to_slots` and `project_from_slots`: every token meets the weights of the experts that it chose only.

A token has S slots, and in each of them one expert (MoA, arXiv 2210.05144). What stands in a slot is as wide as an
expert, so nothing in memory grows with the number of experts, and the heads of all tokens line up: attention over slots
is plain attention.

Shape legend: B batch, N tokens, R = B N rows, C hidden size, E experts, S slots, D width of an expert, J = R S places,
M rows that chose one expert. An expert index of E means that a slot is empty, as at padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.ops.autocast import autocast_together
from mixhead.ops.choice import Choice
from mixhead.ops.cpu import projections as cpu_projections
from mixhead.ops.crossover.rulings import What, ruling
from mixhead.ops.projections.api import ENGINES, check, dtype_of_products, of_engine
from mixhead.ops.slot_projections.engine import SlotProjections
from mixhead.ops.slot_projections.engines import SLOT_PROJECTIONS


def project_to_slots(hidden_BNC: Tensor, weight_EDC: Tensor, expert_BNS: Tensor, *, impl: str = "auto") -> Tensor:
    """What the experts of each token make of it: x W_e^T for the expert e of every slot (the queries of MoA).

    Args:
        hidden_BNC: hidden states.
        weight_EDC: the weights of every expert; any strides, so that `weight_ECD.mT` is one too.
        expert_BNS: int64, the expert of each slot; E where the slot is empty. No expert stands in two slots of a token.
        impl: "auto" or one of `SLOT_PROJECTIONS`.

    Returns:
        [B, N, S, D], zero in empty slots, in the dtype of `hidden_BNC` (under autocast in its dtype).

    Raises:
        MixheadError: where shapes, dtypes or the name of the implementation do not fit, or where the implementation
            that was asked for cannot take these arguments here.
    """
    hidden_BNC, weight_EDC = autocast_together(hidden_BNC, weight_EDC)
    check_experts(weight_EDC, expert_BNS)
    check("hidden_BNC", hidden_BNC, (*expert_BNS.shape[:2], weight_EDC.shape[2]), weight_EDC)
    run = pick(impl, hidden_BNC, weight_EDC, expert_BNS)
    return run.to_slots(hidden_BNC, weight_EDC, expert_BNS)


def project_from_slots(
    out_BNSD: Tensor,
    weight_EDC: Tensor,
    expert_BNS: Tensor,
    gates_BNS: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """The sum of what the experts make of their slots: y = sum_s g_s out_s W_e(s) (the output projection of MoA).

    Args:
        out_BNSD: what stands in the slots; empty slots are never read into the result.
        weight_EDC: the weights of every expert; any strides.
        expert_BNS: int64, the expert of each slot; E where the slot is empty. No expert stands in two slots of a token.
        gates_BNS: weights of the slots; None where attention has applied them already.
        impl: "auto" or one of `SLOT_PROJECTIONS`.

    Returns:
        [B, N, C] in the dtype of `out_BNSD` (under autocast in its dtype), zero where every slot is empty.

    Raises:
        MixheadError: where shapes, dtypes or the name of the implementation do not fit, or where the implementation
            that was asked for cannot take these arguments here.
    """
    out_BNSD, weight_EDC = autocast_together(out_BNSD, weight_EDC)
    check_experts(weight_EDC, expert_BNS)
    check("out_BNSD", out_BNSD, (*expert_BNS.shape, weight_EDC.shape[1]), weight_EDC)
    if gates_BNS is not None and gates_BNS.shape != expert_BNS.shape:
        raise MixheadError(f"gates_BNS must be {list(expert_BNS.shape)}, got {list(gates_BNS.shape)}.")
    run = pick(impl, out_BNSD, weight_EDC, expert_BNS)
    return run.from_slots(out_BNSD, weight_EDC, expert_BNS, gates_BNS)


def explain_slot_projection(rows: Tensor, weight_EDC: Tensor, expert_BNS: Tensor) -> Choice:
    """Which implementation `impl="auto"` takes for a projection of `rows` (to or from slots), and why."""
    experts, slots = weight_EDC.shape[0], expert_BNS.shape[2]
    if slots == experts:
        return Choice("dense", "every token uses every expert: there is nothing to skip")
    if rows.device.type != "cpu":
        return Choice(
            "dense", f"listing the rows of experts would make the {rows.device.type} device wait for the host"
        )
    if torch.compiler.is_compiling():
        if cpu_projections.refusal(rows) is None:
            return Choice("cpu", f"{slots} of {experts} experts are chosen: the C++ kernel skips the rest")
        return Choice("dense", "a compiled graph needs static shapes, and the dense projection has them")
    num_rows, width = expert_BNS.shape[0] * expert_BNS.shape[1], weight_EDC.shape[1]
    if num_rows == 0 or weight_EDC.numel() == 0:
        return Choice("dense", "there is nothing to compute")
    what = What(dtype_of_products(rows), torch.is_grad_enabled() and (rows.requires_grad or weight_EDC.requires_grad))
    reasons = []
    for engine in ENGINES:
        why = SLOT_PROJECTIONS[engine].refusal(rows)
        if why is None:
            limit, why = ruling("slot projection", engine, what, width, num_rows)
            if slots / experts <= limit:
                return Choice(engine, f"{slots} of {experts} experts are chosen: {why}")
        reasons.append(why)
    return Choice("dense", "; ".join(reasons))


def pick(impl: str, rows: Tensor, weight_EDC: Tensor, expert_BNS: Tensor) -> SlotProjections:
    """The projections of the engine that runs."""
    if impl == "auto":
        return SLOT_PROJECTIONS[explain_slot_projection(rows, weight_EDC, expert_BNS).impl].run
    return of_engine(impl, SLOT_PROJECTIONS, rows, weight_EDC)


def check_experts(weight_EDC: Tensor, expert_BNS: Tensor) -> None:
    """Raises where the weights or the experts have not three dimensions, or a token has more slots than experts."""
    if weight_EDC.dim() != 3:
        raise MixheadError(f"weight_EDC must be [experts, width, hidden_size], got {list(weight_EDC.shape)}.")
    if expert_BNS.dim() != 3 or expert_BNS.shape[2] > weight_EDC.shape[0]:
        raise MixheadError(
            f"expert_BNS must be [batch, tokens, slots] with at most {weight_EDC.shape[0]} slots, one for each expert, "
            f"got {list(expert_BNS.shape)}."
        )
    if expert_BNS.dtype != torch.int64:
        raise MixheadError(f"expert_BNS must be torch.int64, got {expert_BNS.dtype}.")
