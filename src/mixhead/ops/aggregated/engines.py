"""All engines of `aggregated_attention`: from its checked arguments to [B, H, N, D]."""

from __future__ import annotations

from mixhead.ops.aggregated import cpu, portable, reference
from mixhead.ops.engine import Engine, table

AGGREGATED_IMPLEMENTATIONS = table(
    Engine("reference", reference.attend), Engine("portable", portable.attend), Engine("cpu", cpu.attend, cpu.refusal)
)
