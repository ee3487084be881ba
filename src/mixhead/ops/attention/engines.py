"""All engines of `head_attention`. A new one is a file with an `ENGINE` and a line here."""

from __future__ import annotations

from mixhead.ops.attention import cpu, dense, flex, gathered, reference, slots, triton

IMPLEMENTATIONS = {
    module.ENGINE.name: module.ENGINE for module in (reference, dense, gathered, cpu, slots, triton, flex)
}
