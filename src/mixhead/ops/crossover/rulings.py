"""Up to which share of the heads an engine is taken, in as few steps as every call can bear, and inside torch.compile.

Inside a compiled graph the answer is a constant: it rests on static sizes, or on all that a graph of symbolic sizes may
meet, and never on what tensors hold.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from mixhead.ops.constant import constant_when_compiled
from mixhead.ops.crossover.store import table
from mixhead.ops.crossover.table import Table, inside, kind_of
from mixhead.ops.crossover.words import sentence
from mixhead.routing import Routing

Ruling = tuple[float, str]  # up to which share of the heads (0: never), and the sentence that says by which race


class What(NamedTuple):
    """What distinguishes calls, beside sizes; see `kind_of`."""

    dtype: torch.dtype
    gradient: bool
    causal: bool = False
    masked: bool = False
    cache: bool = False


def ruling(operator: str, engine: str, what: What, width: int, size: int) -> Ruling:
    """What was measured for calls of that width and size; see `Point` for the two."""
    if torch.compiler.is_compiling():
        # torch.compile takes nothing but plain constants.
        sizes = (width if known(width) else None, size if known(size) else None)
        return ruling_of_graph(
            operator, engine, *sizes, what.dtype, what.gradient, what.causal, what.masked, what.cache
        )
    return ruling_of_class(table_now(operator), operator, engine, what, width, size.bit_length())


def table_now(operator: str) -> Table:
    """The table of an operator for the present number of threads."""
    return table(operator, torch.get_num_threads())


def known(size: int) -> bool:
    """Whether a size is a number: in a compiled graph it may be a symbol."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value  # torch.compile has loaded it

    return has_static_value(size)


@functools.lru_cache(maxsize=4096)
def ruling_of_class(measured: Table, operator: str, engine: str, what: What, width: int, bits: int) -> Ruling:
    """The ruling for all sizes of so many binary digits: few answers, so that each call finds its own ready."""
    return look_up(measured, operator, engine, what, width, inside(bits), fused=False)


@constant_when_compiled
def ruling_of_graph(operator: str, engine: str, width: int | None, size: int | None, *what: Any) -> Ruling:
    """The ruling in a compiled graph, where gates cost the dense computation nothing; `what` is a What in parts."""
    return look_up(table_now(operator), operator, engine, What(*what), width, size, fused=True)


def look_up(
    measured: Table, operator: str, engine: str, what: What, width: int | None, size: int | None, *, fused: bool
) -> Ruling:
    """The verdict of a table, with its sentence."""
    # What is written in PyTorch is made of the same stock products in every dtype.
    dtype = str(what.dtype).removeprefix("torch.") if engine == "cpu" else "float32"
    masked = what.masked and engine == "cpu"
    kind = kind_of(dtype, what.causal, masked, what.gradient, what.cache)
    verdict = measured.verdict(operator, engine, kind, width, size, fused)
    return verdict.share, sentence(operator, engine, kind, verdict, measured, fused)


def share_of(routing: Routing) -> float:
    """The share of all heads that an average token selects; 1 where a graph cannot know it."""
    heads = routing.selected_BNH.shape[-1]
    if routing.heads_per_group is not None and known(heads):
        return routing.heads_per_group * routing.num_groups / heads
    if torch.compiler.is_compiling():
        return 1.0
    return share_selected(routing.selected_BNH)


def share_selected(selected_BNH: torch.Tensor) -> float:
    """The share of the heads that is selected, counted."""
    return selected_BNH.count_nonzero().item() / max(selected_BNH.numel(), 1)
