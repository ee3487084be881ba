"""`LayerHeads`: how many heads a layer has, uses and shares."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerHeads:
    """How many heads one attention layer has, uses per token, and shares among all tokens."""

    num_heads: int
    active_heads: int
    shared_heads: int

    @property
    def is_dense(self) -> bool:
        """Whether every token uses every head, so that there is nothing to route."""
        return self.active_heads == self.num_heads

    @property
    def top_k(self) -> int:
        """How many heads a token chooses beside the shared ones."""
        return self.active_heads - self.shared_heads
