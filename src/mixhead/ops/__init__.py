"""Operators that compute exactly the selected heads."""

from mixhead.ops.aggregated import AGGREGATED_IMPLEMENTATIONS, RelativeBias, aggregated_attention, explain_aggregated
from mixhead.ops.attention import IMPLEMENTATIONS, explain, head_attention
from mixhead.ops.choice import Choice
from mixhead.ops.engine import Engine
from mixhead.ops.glu import GLU_IMPLEMENTATIONS, convolutional_glu, explain_glu
from mixhead.ops.projections import (
    PROJECTIONS,
    explain_projection,
    project_from_heads,
    project_to_heads,
    weight_by_head,
)
from mixhead.ops.slot_projections import (
    SLOT_PROJECTIONS,
    explain_slot_projection,
    project_from_slots,
    project_to_slots,
)

__all__ = [
    "AGGREGATED_IMPLEMENTATIONS",
    "GLU_IMPLEMENTATIONS",
    "IMPLEMENTATIONS",
    "PROJECTIONS",
    "SLOT_PROJECTIONS",
    "Choice",
    "Engine",
    "RelativeBias",
    "aggregated_attention",
    "convolutional_glu",
    "explain",
    "explain_aggregated",
    "explain_glu",
    "explain_projection",
    "explain_slot_projection",
    "head_attention",
    "project_from_heads",
    "project_from_slots",
    "project_to_heads",
    "project_to_slots",
    "weight_by_head",
]
