"""The races of the projections of selected heads and of chosen experts, against one product over all of them.

Shape legend: N rows, C hidden size, H heads (or experts), S slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from mixhead.ops.cpu import projections as cpu
from mixhead.ops.crossover.attention import DTYPES, Sizes, pairs
from mixhead.ops.crossover.inputs import gated_routing, normal, with_gradient, without_gradient
from mixhead.ops.crossover.race import Call, Race
from mixhead.ops.crossover.table import kind_of
from mixhead.ops.projections.engine import weight_by_head
from mixhead.ops.projections.engines import PROJECTIONS
from mixhead.ops.slot_projections.engines import SLOT_PROJECTIONS

HEADS, SLOTS = "projection", "slot projection"
HIDDEN_SIZE = 256
EXPERTS = 8
SHARES = (0.75, 0.5, 0.25)
ROWS: Sizes = {64: (1, 16, 256), 32: (1, 256), 128: (1, 256)}
EXPERT_ROWS: Sizes = {64: (1, 16, 256), 16: (1, 256), 1024: (16,)}
THOROUGH: Sizes = dict.fromkeys((64, 8, 16, 32, 128, 1024), (1, 16, 64, 256, 1024))


def races(kernel: bool, gradient: bool, thorough: bool) -> Iterator[Race]:
    """Both projections, one after the other; a loop over the heads is tried where the kernel does not win."""
    for dtype, engine in product(DTYPES, ("cpu", "gathered")):
        if engine == "cpu" and not (kernel and cpu.refusal(torch.empty(0, dtype=DTYPES[dtype])) is None):
            continue
        if engine == "gathered" and dtype != "float32":
            continue  # The same stock products in every dtype.
        better = "cpu" if engine == "gathered" and not thorough else None
        for operator, sizes, shares, runs_of in (
            (HEADS, ROWS, SHARES, heads_of),
            (SLOTS, EXPERT_ROWS, SHARES[1:], slots_of),
        ):
            for width, size in pairs(THOROUGH if thorough else sizes):
                runs = partial(runs_of, engine, dtype, gradient, width, size)
                yield Race(operator, engine, kind_of(dtype, gradient=gradient), width, size, shares, runs, better)


def heads_of(
    engine: str, dtype: str, gradient: bool, width: int, rows: int, share: float
) -> Iterator[tuple[Call, ...]]:
    """To heads and back; the dense computation of a layer clears nothing in between."""
    heads = max(4, 512 // width)
    hidden_BNC, weight_XC = normal(1, rows, HIDDEN_SIZE), normal(heads * width, HIDDEN_SIZE)
    leaves = tuple(x.to(DTYPES[dtype]).requires_grad_(gradient) for x in (hidden_BNC, weight_XC, weight_XC.T))
    selected_BNH = gated_routing(1, rows, heads, share, torch.float32).selected_BNH

    def ours() -> Tensor:
        hidden_BNC, weight_XC, weight_CX = leaves
        to_heads, from_heads = PROJECTIONS[engine].run
        q_BHND = to_heads(hidden_BNC, weight_XC.unflatten(0, (heads, -1)), None, selected_BNH)
        return from_heads(q_BHND, weight_by_head(weight_CX, heads), None, selected_BNH, None)

    def dense() -> Tensor:
        hidden_BNC, weight_XC, weight_CX = leaves
        return F.linear(F.linear(hidden_BNC, weight_XC), weight_CX)

    yield calls(ours, dense, leaves, gradient)


def slots_of(
    engine: str, dtype: str, gradient: bool, width: int, rows: int, share: float
) -> Iterator[tuple[Call, ...]]:
    """To the slots of experts and back."""
    hidden_BNC, weight_EDC = normal(1, rows, HIDDEN_SIZE), normal(EXPERTS, width, HIDDEN_SIZE)
    leaves = tuple(x.to(DTYPES[dtype]).requires_grad_(gradient) for x in (hidden_BNC, weight_EDC, weight_EDC + 1.0))
    slots = round(share * EXPERTS)
    noise_BNE = torch.rand(1, rows, EXPERTS, generator=torch.Generator().manual_seed(1))
    expert_BNS = noise_BNE.argsort(-1)[..., :slots].contiguous()

    def by(name: str) -> Tensor:
        hidden_BNC, weight_EDC, weight_out_EDC = leaves
        to_slots, from_slots = SLOT_PROJECTIONS[name].run
        return from_slots(to_slots(hidden_BNC, weight_EDC, expert_BNS), weight_out_EDC, expert_BNS, None)

    yield calls(lambda: by(engine), lambda: by("dense"), leaves, gradient)


def calls(ours: Call, dense: Call, leaves: tuple[Tensor, ...], gradient: bool) -> tuple[Call, ...]:
    """(the engine, the dense computation, again that): there are no gates that could be left out."""
    if gradient:
        ours, dense = with_gradient(ours, leaves), with_gradient(dense, leaves)  # type: ignore[arg-type]
    else:
        ours, dense = without_gradient(ours), without_gradient(dense)
    return ours, dense
