"""Projections to and from the slots of chosen experts."""

from mixhead.ops.slot_projections.api import explain_slot_projection, project_from_slots, project_to_slots
from mixhead.ops.slot_projections.engines import SLOT_PROJECTIONS

__all__ = ["SLOT_PROJECTIONS", "explain_slot_projection", "project_from_slots", "project_to_slots"]
