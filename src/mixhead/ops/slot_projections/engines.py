"""All engines of the projections. A new one is a file with an `ENGINE` and a line here; it refuses by its rows."""

from __future__ import annotations

from mixhead.ops.cpu import projections as kernel
from mixhead.ops.engine import Engine, table
from mixhead.ops.slot_projections import dense, gathered, reference
from mixhead.ops.slot_projections.engine import SlotProjections

SLOT_PROJECTIONS = table(
    reference.ENGINE,
    dense.ENGINE,
    gathered.ENGINE,
    Engine("cpu", SlotProjections(kernel.to_slots, kernel.from_slots), kernel.refusal),
)
