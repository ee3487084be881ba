"""A linear router with 0 / 1 gates as one operator: scores, selection and probabilities of a token in one go.

Decoding asks a router for one token at a time, and a dozen operators for nine numbers take longer than the attention of
that token. Here are the schema and the question whether the operator can be taken; the library that `mixhead.ops`
compiles brings the computation (`ops/cpu/source/routing.h`). What it computes is told by `BinaryRouter.route`, which
runs everywhere else.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from mixhead.plain import is_plain
from mixhead.routing.scores import ScoreProjection

NAME = "mixhead::route_linear_cpu"
torch.library.define(
    NAME,
    "(Tensor hidden, Tensor weight, Tensor bias, Tensor shared, int active_heads, int num_groups)"
    " -> (Tensor gates, Tensor selected, Tensor probs)",
)
ROUTE = torch.ops.mixhead.route_linear_cpu.default
DTYPES = (torch.float32, torch.bfloat16)


@torch.library.register_fake(NAME)
def route_fake(hidden: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the gates, the selection and the probabilities."""
    shape = (*hidden.shape[:2], weight.shape[0])
    gates = hidden.new_empty(shape, dtype=torch.float32)
    return gates, hidden.new_empty(shape, dtype=torch.bool), torch.empty_like(gates)


def can_route(proj: nn.Linear, hidden_BNC: Tensor) -> bool:
    """Whether the operator is loaded, and nothing is asked of it but numbers: no gradient, no transformation."""
    return (
        not torch.compiler.is_compiling()
        and is_loaded()
        and not torch.is_grad_enabled()
        and is_plain(proj, ScoreProjection)
        and type(hidden_BNC) is Tensor
        and hidden_BNC.is_cpu
        and type(weight := proj.weight) is nn.Parameter
        and weight.is_cpu
        and weight.dtype == hidden_BNC.dtype
        and weight.dtype in DTYPES
        and torch._C._functorch.maybe_current_level() is None
    )


@functools.cache
def is_loaded() -> bool:
    """Whether the compiled library is there; who loads it clears this cache, since asking takes as long as routing."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(NAME, "CPU")
