"""Operators that compute exactly the selected heads."""

from mixhead.ops.aggregated import AGGREGATED_IMPLEMENTATIONS, RelativeBias, aggregated_attention
from mixhead.ops.api import IMPLEMENTATIONS, Choice, explain, head_attention

__all__ = [
    "AGGREGATED_IMPLEMENTATIONS",
    "IMPLEMENTATIONS",
    "Choice",
    "RelativeBias",
    "aggregated_attention",
    "explain",
    "head_attention",
]
