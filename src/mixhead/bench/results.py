"""What was measured: rows, the machine they were measured on, and the JSON that holds both."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mixhead.bench.timing import Ratio
from mixhead.files import write_text
from mixhead.ops import cpu
from mixhead.ops.crossover import cpu_model

OK, WRONG, SKIPPED = "ok", "wrong", "skipped"


@dataclass(frozen=True)
class Row:
    """One engine at one case.

    Attributes:
        subject: `core`, `module` or `model`.
        direction: what is computed.
        case: the shape, in words.
        dtype: its name.
        routing: how heads are chosen.
        share: of the heads, how many an average token uses.
        threads: of PyTorch.
        engine: the engine, or `masked`.
        status: "ok", "wrong" (then there is no time) or "skipped".
        note: why it is not "ok".
        error: the largest error against float64, relative to the largest number.
        dense: how many times faster than dense attention alone (of the whole module or model).
        gated: how many times faster than dense attention followed by the gates.
        wall_ms: milliseconds of one run.
        cpu_ms: the same in CPU time of all threads.
        memory_mib: what a run adds to the memory at its peak; `dense_memory_mib` is the dense baseline's.
        required: what a ratio has to reach, `gated` where `required_of_gated` and else `dense`; `reached` says whether
            it does.
    """

    subject: str
    direction: str
    case: str
    dtype: str
    routing: str
    share: float
    threads: int
    engine: str
    status: str = OK
    note: str = ""
    error: float | None = None
    dense: Ratio | None = None
    gated: Ratio | None = None
    wall_ms: float | None = None
    cpu_ms: float | None = None
    memory_mib: float | None = None
    dense_memory_mib: float | None = None
    required: float | None = None
    required_of_gated: bool = False
    reached: bool | None = None

    @property
    def judged(self) -> Ratio | None:
        """The ratio that counts."""
        return self.gated if self.required_of_gated else self.dense


@dataclass
class Results:
    """Rows, and under which circumstances they were measured."""

    command: str
    rounds: int
    rows: list[Row] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=lambda: describe_machine())

    @property
    def wrong(self) -> bool:
        """Whether any engine computed something else than the reference."""
        return any(row.status == WRONG for row in self.rows)

    def to_json(self) -> str:
        """Everything, in a file's form; what is not a number is null."""
        content = {"command": self.command, "rounds": self.rounds, **self.machine}
        return json.dumps({**content, "rows": [finite(asdict(row)) for row in self.rows]}, indent=1) + "\n"

    def write(self, file: Path) -> None:
        """Writes the JSON in one step: a reader finds the rows of before or those of now."""
        write_text(file, self.to_json())


def describe_machine() -> dict[str, Any]:
    """Date, versions and processor."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "instruction_set": cpu.best_level(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in ("mixhead", "transformers")},
        },
    }


def finite(value: Any) -> Any:
    """The same without infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def met(rows: Sequence[Row]) -> tuple[int, int]:
    """(rows that reach what is required of them, rows of which something is required)."""
    wanted = [row for row in rows if row.required is not None]
    return sum(bool(row.reached) for row in wanted), len(wanted)
