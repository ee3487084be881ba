"""The C++ kernel of `mixhead.ops.cpu`: queries that select a head are gathered, so the others cost nothing."""

from __future__ import annotations

from mixhead.ops import cpu
from mixhead.ops.engine import Engine

ENGINE = Engine("cpu", cpu.attend, lambda q, k, v, routing, mask: cpu.refusal(q, mask))
