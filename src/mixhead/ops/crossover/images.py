"""The races of what image models need beside attention: aggregated attention and the convolutional GLU.

Shape legend: B batch, N tokens of a map, T pooled keys, H heads, D head dim, L places of a window, M channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import isqrt

import torch
from torch import Tensor

from mixhead.ops.aggregated.arguments import AggregatedArguments, RelativeBias
from mixhead.ops.aggregated.engines import AGGREGATED_IMPLEMENTATIONS
from mixhead.ops.crossover.attention import DTYPES, Sizes, pairs
from mixhead.ops.crossover.inputs import gated_routing, normal
from mixhead.ops.crossover.projections import calls
from mixhead.ops.crossover.race import Call, Race
from mixhead.ops.crossover.table import kind_of
from mixhead.ops.glu.engines import GLU_IMPLEMENTATIONS

AGGREGATED, GLU = "aggregated attention", "glu"
HEADS, WINDOW, POOLED = 4, 3, 49
SHARES = (1.0, 0.5)
MAPS: Sizes = {24: (1, 49, 784), 8: (1, 49)}
CHANNELS: Sizes = {64: (1, 49, 784), 8: (1, 49)}
THOROUGH: Sizes = dict.fromkeys((64, 8, 16, 24, 32), (1, 16, 49, 196, 784))


def races_of_aggregated(kernel: bool, gradient: bool, thorough: bool) -> Iterator[Race]:
    """The kernel against plain PyTorch."""
    for dtype in DTYPES if kernel else ():
        for width, size in pairs(THOROUGH if thorough else MAPS):
            runs = partial(aggregated_of, dtype, gradient, width, size)
            yield Race(AGGREGATED, "cpu", kind_of(dtype, gradient=gradient), width, size, SHARES, runs)


def races_of_glu(kernel: bool, gradient: bool, thorough: bool) -> Iterator[Race]:
    """The kernel against plain PyTorch."""
    for dtype in DTYPES if kernel else ():
        for width, size in pairs(THOROUGH if thorough else CHANNELS):
            runs = partial(glu_of, dtype, gradient, width, size)
            yield Race(GLU, "cpu", kind_of(dtype, gradient=gradient), width, size, (1.0,), runs)


def aggregated_of(dtype: str, gradient: bool, width: int, tokens: int, share: float) -> Iterator[tuple[Call, ...]]:
    """Aggregated attention as in the models, against its portable form, which computes all heads."""
    places, side = WINDOW**2, isqrt(tokens)
    states = [normal(1, HEADS, n, width) for n in (tokens, tokens, tokens, POOLED, POOLED)]
    tables = [normal(HEADS, width), normal(HEADS).exp(), normal(HEADS, places)]
    tokens_HDL, bias_HL, pool_HRS = normal(HEADS, width, places), normal(HEADS, places), normal(HEADS, 9, 9)
    leaves = tuple(
        x.to(DTYPES[dtype]).requires_grad_(gradient) for x in (*states, *tables, tokens_HDL, bias_HL, pool_HRS)
    )
    row_YU, column_XV = (torch.zeros(side, isqrt(POOLED), dtype=torch.int64) for _ in range(2))
    routing = gated_routing(1, tokens, HEADS, share, torch.float32)
    q, k, v, pooled_k, pooled_v, embedding, temperature, local_bias, learnable, learnable_bias, table = leaves
    gates, selected, bias = routing.gates_BNH.to(q.dtype), routing.selected_BNH, RelativeBias(table, row_YU, column_XV)
    arguments = AggregatedArguments(
        q, k, v, pooled_k, pooled_v, gates, selected, (side, side), embedding, temperature, local_bias, bias,
        learnable, learnable_bias,
    )  # fmt: skip

    def by(name: str) -> Tensor:
        return AGGREGATED_IMPLEMENTATIONS[name].run(arguments)

    yield calls(lambda: by("cpu"), lambda: by("portable"), leaves, gradient)


def glu_of(dtype: str, gradient: bool, channels: int, tokens: int, _share: float) -> Iterator[tuple[Call, ...]]:
    """The convolutional GLU."""
    side = isqrt(tokens)
    hidden = normal(1, tokens, 2 * channels).to(DTYPES[dtype]).requires_grad_(gradient)
    bias, weight = normal(2 * channels).requires_grad_(gradient), normal(channels, 3, 3).requires_grad_(gradient)
    conv_bias = normal(channels).requires_grad_(gradient)

    def by(name: str) -> Tensor:
        return GLU_IMPLEMENTATIONS[name].run(hidden, bias, weight, conv_bias, (side, side))

    yield calls(lambda: by("cpu"), lambda: by("reference"), (hidden, bias, weight, conv_bias), gradient)
