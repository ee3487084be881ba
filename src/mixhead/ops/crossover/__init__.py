"""Which engine is fast on this processor: measured once, kept, and looked up in every call."""

from mixhead.ops.crossover.race import LONG, SHORT
from mixhead.ops.crossover.store import LIBRARIES, cpu_model, forget, measure, measure_at_length, table
from mixhead.ops.crossover.table import MARGIN, Point, Table, Verdict

__all__ = [
    "LIBRARIES",
    "LONG",
    "MARGIN",
    "SHORT",
    "Point",
    "Table",
    "Verdict",
    "cpu_model",
    "forget",
    "measure",
    "measure_at_length",
    "table",
]
