"""All engines of `head_attention`. A new one is a file with an `ENGINE` and a line here.

An engine runs as `run(q_BHND, k_BKTD, v_BKTD, routing, causal=, scale=, attn_mask=)`, and refuses by (q_BHND, k_BKTD,
v_BKTD, routing, attn_mask).
"""

from __future__ import annotations

from mixhead.ops.attention import cpu, dense, flex, gathered, reference, slots, triton
from mixhead.ops.engine import table

IMPLEMENTATIONS = table(
    *(module.ENGINE for module in (reference, dense, gathered, cpu, slots, triton, flex)),
)
