"""Measures from which sizes the C++ kernel beats dense attention, for `mixhead.ops.crossover`.

From a small size upwards, doubling, until the kernel has won clearly twice: what is larger is not measured.

Shape legend: N queries, T keys, D head dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixhead.bench.routings import RANDOM, make_routing
from mixhead.bench.timing import race, ratio
from mixhead.errors import MixheadError
from mixhead.ops import cpu, head_attention
from mixhead.ops.crossover import SHARES, Point

ROUNDS = 7
SECONDS = 0.001
CLEARLY = 1.2
BUDGET_S = 110.0
MAX_CACHE = 2**24  # numbers in the keys of one point: beyond, caches of the processor play no part any more

LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
CACHED = (64, 256, 1024, 4096)
FEW = ((1, 1), (1, 4), (4, 1), (4, 4), (16, 1))  # (queries, query heads for each key-value head) against a cache


@dataclass(frozen=True)
class Climb:
    """Points that differ in size alone, the smallest first."""

    points: tuple[Point, ...]


def climbs() -> Iterator[Climb]:
    """All that is measured, what most models are first."""
    for head_dim in (64, 128, 32):
        for lanes in (16, 64, 4):
            for dtype in ("float32", "bfloat16"):
                for share in sorted(SHARES, reverse=True):
                    for causal in (False, True):
                        start = Point(dtype, causal, share, lanes, 1, head_dim, 1, 1, 0.0)
                        yield Climb(tuple(replace(start, queries=n, keys=n) for n in LENGTHS))
                    for queries, groups in FEW:
                        start = Point(dtype, queries > 1, share, lanes, groups, head_dim, queries, 1, 0.0)
                        yield Climb(tuple(replace(start, keys=keys) for keys in CACHED))


def measure_crossover(on_progress: Callable[[int, int], None], budget_s: float = BUDGET_S) -> list[Point]:
    """Measures with as many threads as PyTorch is set to.

    Args:
        on_progress: called with (done, all).
        budget_s: seconds after which nothing more is begun; what is left out keeps the kernel's built-in limits.

    Raises:
        MixheadError: where there is no kernel to measure.
    """
    built, reason = cpu.available()
    if not built:
        raise MixheadError(f"There is nothing to measure: {reason}.")
    torch.manual_seed(0)
    begin, found = time.monotonic(), list[Point]()
    plan = list(climbs())
    for done, climb in enumerate(plan):
        on_progress(done, len(plan))
        if time.monotonic() - begin > budget_s:
            break
        found += measure_climb(climb)
    on_progress(len(plan), len(plan))
    return found


def measure_climb(climb: Climb, measure: Callable[[Point], float] | None = None) -> list[Point]:
    """The points up to where the kernel has won clearly twice in a row."""
    measured: list[Point] = []
    for point in climb.points:
        if point.lanes // point.groups * point.keys * point.head_dim > MAX_CACHE:
            break
        measured.append(replace(point, ratio=(measure or kernel_ratio)(point)))
        if len(measured) > 1 and all(p.ratio > CLEARLY for p in measured[-2:]):
            break
    return measured


@torch.no_grad()
def kernel_ratio(point: Point) -> float:
    """(time of dense attention with its gates) / (time of the kernel), the median.

    With one thread by CPU time, which a busy machine does not disturb; with several by the wall clock.
    """
    dtype = getattr(torch, point.dtype)

    def states(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, point.head_dim).to(dtype)

    kv_heads = max(1, point.lanes // point.groups)
    q_BHND = states(point.lanes, point.queries)
    k_BKTD, v_BKTD = states(kv_heads, point.keys), states(kv_heads, point.keys)
    routing = make_routing(RANDOM, 1, point.queries, point.lanes, point.share)
    routing = replace(routing, gates_BNH=routing.gates_BNH.to(dtype))

    def engine(impl: str) -> Callable[[], Tensor]:
        return lambda: head_attention(q_BHND, k_BKTD, v_BKTD, routing, causal=point.causal, impl=impl)

    dense, kernel = race([engine("dense"), engine("cpu")], ROUNDS, SECONDS)
    measured = ratio(dense, kernel)
    return measured.cpu if torch.get_num_threads() == 1 else measured.wall


def summary(points: Sequence[Point]) -> list[tuple[str, str]]:
    """(what is computed, from which size on the kernel is taken), for 16 lanes and head dim 64."""
    lines = []
    for dtype in ("float32", "bfloat16"):
        for queries, causal, title in ((0, False, "bidirectional"), (0, True, "causal"), (1, False, "decode")):
            for share in sorted(SHARES, reverse=True):
                chosen = [
                    p
                    for p in points
                    if (p.dtype, p.causal, p.share, p.lanes, p.groups, p.head_dim) == (dtype, causal, share, 16, 1, 64)
                    and (p.queries == 1 if queries else p.queries == p.keys)
                ]
                if chosen:
                    lines.append((f"{title}, {dtype}, {share:.0%} of heads", first_win(chosen)))
    return lines


def first_win(points: Sequence[Point]) -> str:
    """From how many keys on the kernel wins at every measured point, in words."""
    ordered = sorted(points, key=lambda p: p.keys)
    lost = [index for index, point in enumerate(ordered) if not point.pays]
    start = lost[-1] + 1 if lost else 0
    if start == len(ordered):
        return f"never up to {ordered[-1].keys} keys ({ordered[-1].ratio:.2f} of dense)"
    return f"from {ordered[start].keys} keys ({ordered[start].ratio:.2f} of dense)"
