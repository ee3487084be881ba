"""Operators that compute exactly the selected heads."""

from mixhead.ops.api import IMPLEMENTATIONS, Choice, explain, head_attention
from mixhead.ops.projections import (
    PROJECTIONS,
    explain_projection,
    project_from_heads,
    project_to_heads,
    weight_by_head,
)

__all__ = [
    "IMPLEMENTATIONS",
    "PROJECTIONS",
    "Choice",
    "explain",
    "explain_projection",
    "head_attention",
    "project_from_heads",
    "project_to_heads",
    "weight_by_head",
]
