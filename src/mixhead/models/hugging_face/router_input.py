"""The hidden states that a router sees: the input of the attention module, lined up with its queries.

Shape legend: B batch, N queries, C hidden size, H heads, D head dim, X tokens of all samples.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mixhead.errors import MixheadError

# What attention modules of transformers call the states that their queries come from, the likeliest first.
NAMES = ("hidden_states", "query", "queries", "query_tensor", "query_states", "latents", "q")


class RouterInput:
    """The input of one call of an attention module.

    Vision towers for images of any size have the patches of all images in one row, [X, C], and call the attention once
    for each image; what stands in line is then given out in order.

    Args:
        hidden: [B, N, C], or with any other axes before the last.
    """

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden
        self.given = 0

    def beside(self, q_BHND: Tensor, name: str) -> Tensor:
        """The hidden states of these queries, [B, N, C]; the name is that of the module, for the error."""
        batch, _heads, queries, _dim = q_BHND.shape
        shape = self.hidden.shape
        if len(shape) == 3 and shape[0] == batch and shape[1] == queries:
            return self.hidden
        rows_XC = self.hidden.reshape(-1, shape[-1])
        first, self.given = self.given, self.given + batch * queries
        if rows_XC.shape[0] == batch * queries or (batch == 1 and self.given <= rows_XC.shape[0]):
            return rows_XC[first : self.given].view(batch, queries, -1)
        raise MixheadError(
            f"{name} cannot route: its {batch} x {queries} queries are not those of its hidden states of shape "
            f"{list(shape)}, so no router knows which belong together."
        )


@functools.cache
def query_argument(forward: Callable[..., Any]) -> Callable[[tuple[Any, ...], dict[str, Any]], Tensor]:
    """How to find the states that queries come from among the arguments of an attention module's `forward`."""
    parameters = [*inspect.signature(forward).parameters][1:]
    name = next((name for name in NAMES if name in parameters), parameters[0])
    place = parameters.index(name)

    def find(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        found: Tensor = args[place] if place < len(args) else kwargs[name]
        return found

    return find
