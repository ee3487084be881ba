"""`project_to_slots` and `project_from_slots`: every token meets the weights of the experts that it chose only.

A token has S slots, and in each of them one expert (MoA, arXiv 2210.05144). What stands in a slot is as wide as an
expert, so nothing in memory grows with the number of experts, and the heads of all tokens line up: attention over slots
is plain attention.

Shape legend: B batch, N tokens, R = B N rows, C hidden size, E experts, S slots, D width of an expert, J = R S places,
M rows that chose one expert. An expert index of E means that a slot is empty, as at padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.ops.autocast import autocast_together
from mixhead.ops.choice import Choice
from mixhead.ops.cpu import projections as cpu_projections
from mixhead.ops.crossover.rulings import What, ruling
from mixhead.ops.engine import Engine, table
from mixhead.ops.projections import ENGINES, check, dtype_of_products, of_engine


class SlotProjections(NamedTuple):
    """The two projections of one engine, where an empty slot is 0.

    Attributes:
        to_slots: (hidden_BNC, weight_EDC, expert_BNS) to [B, N, S, D].
        from_slots: (out_BNSD, weight_EDC, expert_BNS, gates_BNS) to [B, N, C].
    """

    to_slots: Callable[[Tensor, Tensor, Tensor], Tensor]
    from_slots: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


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


# The reference: the masked mathematics, one line a step.


def reference_to_slots(hidden_BNC: Tensor, weight_EDC: Tensor, expert_BNS: Tensor) -> Tensor:
    """Every expert on every token, then those that stand in the slots."""
    return torch.einsum("bnc,edc,bnse->bnsd", hidden_BNC, weight_EDC, chosen_BNSE(expert_BNS, weight_EDC))


def reference_from_slots(out_BNSD: Tensor, weight_EDC: Tensor, expert_BNS: Tensor, gates_BNS: Tensor | None) -> Tensor:
    """Every expert on every slot, those that do not stand in it times 0."""
    chosen = chosen_BNSE(expert_BNS, weight_EDC)
    if gates_BNS is not None:
        chosen = chosen * gates_BNS.to(chosen.dtype).unsqueeze(-1)
    filled_BNS1 = (expert_BNS < len(weight_EDC)).unsqueeze(-1)
    return torch.einsum("bnsd,bnse,edc->bnc", torch.where(filled_BNS1, out_BNSD, 0.0), chosen, weight_EDC)


def chosen_BNSE(expert_BNS: Tensor, weight_EDC: Tensor) -> Tensor:
    """1 at the expert of each slot, in the dtype of the weights."""
    return F.one_hot(expert_BNS, len(weight_EDC) + 1)[..., :-1].to(weight_EDC.dtype)


# Dense: one product over all experts, what sparsity has to beat.


def dense_to_slots(hidden_BNC: Tensor, weight_EDC: Tensor, expert_BNS: Tensor) -> Tensor:
    """`F.linear` to all experts, then those that stand in the slots."""
    experts, width, _ = weight_EDC.shape
    all_BNED = F.linear(hidden_BNC, weight_EDC.flatten(0, 1)).unflatten(-1, (experts, width))
    index_BNSD = expert_BNS.clamp(max=experts - 1).unsqueeze(-1).expand(-1, -1, -1, width)
    return torch.where((expert_BNS < experts).unsqueeze(-1), all_BNED.gather(2, index_BNSD), 0.0)


def dense_from_slots(out_BNSD: Tensor, weight_EDC: Tensor, expert_BNS: Tensor, gates_BNS: Tensor | None) -> Tensor:
    """The slots at the places of their experts among zeros, then `F.linear` from all experts."""
    experts, width, _ = weight_EDC.shape
    if gates_BNS is not None:
        out_BNSD = out_BNSD * gates_BNS.to(out_BNSD.dtype).unsqueeze(-1)
    filled_BNS1 = (expert_BNS < experts).unsqueeze(-1)
    index_BNSD = expert_BNS.clamp(max=experts - 1).unsqueeze(-1).expand(-1, -1, -1, width)
    zeros_BNED = out_BNSD.new_zeros(*expert_BNS.shape[:2], experts, width)
    all_BNED = zeros_BNED.scatter_add(2, index_BNSD, torch.where(filled_BNS1, out_BNSD, 0.0))
    return F.linear(all_BNED.flatten(2), weight_EDC.permute(2, 0, 1).flatten(1))


# Gathered: a loop over the experts, portable PyTorch with any derivative.


def gathered_to_slots(hidden_BNC: Tensor, weight_EDC: Tensor, expert_BNS: Tensor) -> Tensor:
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


def gathered_from_slots(out_BNSD: Tensor, weight_EDC: Tensor, expert_BNS: Tensor, gates_BNS: Tensor | None) -> Tensor:
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


SLOT_PROJECTIONS = table(
    Engine("reference", SlotProjections(reference_to_slots, reference_from_slots)),
    Engine("dense", SlotProjections(dense_to_slots, dense_from_slots)),
    Engine("gathered", SlotProjections(gathered_to_slots, gathered_from_slots)),
    Engine("cpu", SlotProjections(cpu_projections.to_slots, cpu_projections.from_slots), cpu_projections.refusal),
)
