"""Projections to and from selected heads."""

from mixhead.ops.projections.api import explain_projection, project_from_heads, project_to_heads
from mixhead.ops.projections.engine import weight_by_head
from mixhead.ops.projections.engines import PROJECTIONS

__all__ = ["PROJECTIONS", "explain_projection", "project_from_heads", "project_to_heads", "weight_by_head"]
