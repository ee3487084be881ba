"""Operators that compute exactly the selected heads."""

from mixhead.ops.aggregated import AGGREGATED_IMPLEMENTATIONS, aggregated_attention
from mixhead.ops.api import IMPLEMENTATIONS, Choice, explain, head_attention

__all__ = [
    "AGGREGATED_IMPLEMENTATIONS",
    "IMPLEMENTATIONS",
    "Choice",
    "aggregated_attention",
    "explain",
    "head_attention",
]
