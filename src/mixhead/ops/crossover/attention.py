"""The races of `head_attention`: the engines against the stock kernel on all heads, followed by the gates.

Shape legend: B batch, N queries, T keys, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mixhead.ops.attention import cpu, dense, gathered, slots
from mixhead.ops.crossover.inputs import gated_routing, normal, with_gradient, without_gradient
from mixhead.ops.crossover.race import Call, Race
from mixhead.ops.crossover.table import kind_of
from mixhead.ops.engine import Engine
from mixhead.ops.stock import stock_attention

OPERATOR = "attention"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MANY_BATCHES = 64
FEW_TOKENS = 16  # of a single sequence and of many: what a call costs and what a head costs are both large there

Sizes = dict[int, tuple[int, ...]]  # by width: queries, or keys of a cache
SHARES = (1.0, 0.75, 0.5, 0.25)
# Heads of 64 are what most models have; what is used less is measured at fewer sizes.
QUERIES: Sizes = {64: (1, 16, 64, 256), 8: (1, 16, 64), 32: (1, 16, 256), 128: (1, 16, 256)}
QUERIES_SPARSE: Sizes = {64: (1, 16, 256), 8: (1, 16, 64), 128: (1, 256)}
GRADIENT: Sizes = {64: (1, 4, 16, 64, 256), 8: (1, 16, 64), 32: (1, 16, 256), 128: (1, 16, 256)}
KEYS: Sizes = {64: (1, 64, 1024), 8: (1, 256), 128: (1, 256)}
LONG_QUERIES = (64, 1024)  # the width and the size of the one long race: what is larger is like it
THOROUGH: Sizes = {
    **dict.fromkeys((8, 16, 32, 256), (1, 4, 16, 64, 256)),
    **dict.fromkeys((64, 128), (1, 4, 16, 64, 256, 1024)),
}
PORTABLE: Sizes = {32: (256,), 64: (256, 512)}


@dataclass(frozen=True)
class Setting:
    """What a race computes, beside sizes and shares.

    Attributes:
        dtype: "float32" or "bfloat16".
        causal: whether a query sees the keys up to its own position only.
        masked: whether there is a mask.
        gradient: whether a backward pass follows.
        one_key_head: whether all heads share one key-value head, as slots need.
    """

    dtype: str = "float32"
    causal: bool = False
    masked: bool = False
    gradient: bool = False
    one_key_head: bool = False

    def kind(self, cache: bool = False) -> str:
        """See `kind_of`."""
        return kind_of(self.dtype, self.causal, self.masked, self.gradient, cache)


def races(kernel: bool, gradient: bool, thorough: bool) -> Iterator[Race]:
    """All races, what most models need first; those of the kernel where there is one."""
    for dtype in DTYPES if kernel else ():
        for causal, masked in ((True, False), (False, False), (False, True)):
            yield from squares(Setting(dtype, causal, masked, gradient), thorough)
            if not gradient and not causal:
                yield from caches(Setting(dtype, causal, masked), thorough)
    yield from portable(gradient, "cpu" if kernel and not thorough else None)


def squares(setting: Setting, thorough: bool) -> Iterator[Race]:
    """As many queries as keys. With a gradient a single sequence is the worse of one and many."""
    usual = setting.dtype == "float32" and not setting.masked
    sizes = GRADIENT if setting.gradient else QUERIES if usual else QUERIES_SPARSE
    sizes = THOROUGH if thorough else sizes
    long = usual and not (setting.causal or setting.gradient or thorough)
    for width, size in [*pairs(sizes), *([LONG_QUERIES] if long else [])]:
        batches = (1, MANY_BATCHES) if size == FEW_TOKENS and not setting.gradient else (1,)
        runs = partial(runs_of, cpu.ENGINE, setting, [(batch, size, size, width) for batch in batches])
        yield Race(OPERATOR, "cpu", setting.kind(), width, size, shares_at(size, thorough), runs)


def caches(setting: Setting, thorough: bool) -> Iterator[Race]:
    """A few queries against a cache: the worse of one and of four counts."""
    for width, size in pairs(THOROUGH if thorough else KEYS):
        runs = partial(runs_of, cpu.ENGINE, setting, [(1, queries, size, width) for queries in (1, 4)])
        yield Race(OPERATOR, "cpu", setting.kind(cache=True), width, size, shares_at(size, thorough), runs)


def pairs(sizes: Sizes) -> list[tuple[int, int]]:
    """(width, size), one by one."""
    return [(width, size) for width in sizes for size in sizes[width]]


def shares_at(size: int, thorough: bool) -> tuple[float, ...]:
    """The shares worth a race: where a call costs more than the heads, few."""
    return SHARES if thorough else SHARES[:3] if size > FEW_TOKENS else (1.0, 0.5)


def portable(gradient: bool, unless_won_by: str | None) -> Iterator[Race]:
    """What is written in PyTorch, where the kernel does not win."""
    for causal in (False, True):
        for width, size in pairs(PORTABLE):
            for engine in (slots.ENGINE,) if causal else (slots.ENGINE, gathered.ENGINE):
                setting = Setting(causal=causal, gradient=gradient, one_key_head=engine is slots.ENGINE)
                runs = partial(runs_of, engine, setting, [(1, size, size, width)])
                yield Race(OPERATOR, engine.name, setting.kind(), width, size, SHARES[1:], runs, unless_won_by)


def heads_for(tokens: int) -> int:
    """So many heads that no call takes long."""
    return 8 if tokens <= 64 else 4 if tokens <= 256 else 2


def runs_of(
    engine: Engine[Any], setting: Setting, shapes: Iterable[tuple[int, int, int, int]], share: float
) -> Iterator[tuple[Call, ...]]:
    """The calls for every shape (batch, queries, keys, width)."""
    for shape in shapes:
        yield calls_of(engine, setting, shape, share)


def calls_of(engine: Engine[Any], setting: Setting, shape: tuple[int, int, int, int], share: float) -> tuple[Call, ...]:
    """(the engine, the stock kernel and the gates, the stock kernel alone) on the same random numbers."""
    batch, queries, keys, width = shape
    heads, dtype = heads_for(batch * queries), DTYPES[setting.dtype]
    kv_heads = 1 if setting.one_key_head else heads
    q_BHND = normal(batch, heads, queries, width).to(dtype).requires_grad_(setting.gradient)
    k_BKTD, v_BKTD = (normal(batch, kv_heads, keys, width).to(dtype).requires_grad_(setting.gradient) for _ in range(2))
    routing = gated_routing(batch, queries, heads, share, dtype)
    # True everywhere: the stock kernel reads it all the same, and skips nothing.
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool) if setting.masked else None
    keywords: dict[str, Any] = {"causal": setting.causal, "scale": width**-0.5, "attn_mask": mask}
    calls = (
        lambda: engine.run(q_BHND, k_BKTD, v_BKTD, routing, **keywords),
        lambda: dense.ENGINE.run(q_BHND, k_BKTD, v_BKTD, routing, **keywords),
        lambda: stock_attention(q_BHND, k_BKTD, v_BKTD, **keywords),
    )
    if setting.gradient:
        return tuple(with_gradient(call, (q_BHND, k_BKTD, v_BKTD)) for call in calls)
    return tuple(without_gradient(call) for call in calls)
