"""From which sizes the C++ kernel beats dense attention, as measured on this machine.

Timing is done elsewhere; here the measured points are kept, in one small file for each machine, build of the kernel and
number of threads, and looked up. Without a file, or with one that cannot be read, the kernel's built-in limits hold.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import platform
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.ops.cpu import best_level, compiling

logger = logging.getLogger(__name__)

# What the kernel must gain at a measured point to be taken there: in doubt dense attention is, which is never wrong.
MARGIN = 1.03
SHARES = (0.5, 1.0)  # of the heads, at which points are measured


@dataclass(frozen=True)
class Point:
    """One measured size. Sizes are powers of 2.

    Attributes:
        dtype: "float32" or "bfloat16".
        causal: whether a query sees the keys up to its own position only.
        share: of the heads, how many a token uses.
        lanes: batch x query heads.
        groups: query heads for each key-value head.
        head_dim: D.
        queries: N.
        keys: T.
        ratio: (time of dense attention with its gates) / (time of the kernel).
    """

    dtype: str
    causal: bool
    share: float
    lanes: int
    groups: int
    head_dim: int
    queries: int
    keys: int
    ratio: float

    @property
    def size(self) -> tuple[int, ...]:
        """What orders points by size: queries first, since a kernel for few of them is another than for many."""
        return self.queries, self.keys * self.lanes * self.head_dim, self.groups

    @property
    def pays(self) -> bool:
        """Whether the kernel is taken here."""
        return self.ratio >= MARGIN


@dataclass(frozen=True, eq=False)
class Table:
    """All measured points."""

    points: tuple[Point, ...]

    @functools.cache  # noqa: B019  # one table lives as long as the process
    def pays(
        self, dtype: str, causal: bool, share: float, lanes: int, groups: int, head_dim: int, queries: int, keys: int
    ) -> bool | None:
        """Whether the kernel is faster there; None where nothing as small was measured.

        The largest measured point that is no larger in any dimension decides: larger sizes gain at least as much. For
        the share it is the other way around, since skipped heads are the gain: the nearest one above decides.
        """
        inside = [
            p
            for p in self.points
            if (p.dtype, p.causal) == (dtype, causal)
            and p.share >= share
            and p.lanes <= lanes
            and p.groups <= groups
            and p.head_dim <= head_dim
            and p.queries <= queries
            and p.keys <= keys
        ]
        if not inside:
            return None
        decisive = max(inside, key=lambda p: (-p.share, p.size))
        return decisive.pays


def measured(q_BHND: Tensor, k_BKTD: Tensor, selected_BNH: Tensor, causal: bool) -> bool | None:
    """Whether the kernel pays for these arguments, as measured on this machine; None where that is not known."""
    table = load(torch.get_num_threads())
    if table is None:
        return None
    batch, heads, queries, head_dim = q_BHND.shape
    keys, groups = k_BKTD.shape[2], heads // k_BKTD.shape[1]
    dtype = str(q_BHND.dtype).removeprefix("torch.")
    sizes = [floor_power(size) for size in (batch * heads, groups, head_dim, queries, keys)]
    causal = causal and queries > 1
    with_all_heads = table.pays(dtype, causal, 1.0, *sizes)
    if with_all_heads is None or with_all_heads:
        return with_all_heads
    share = int(selected_BNH.sum()) / selected_BNH.numel()
    return table.pays(dtype, causal, next(s for s in SHARES if s >= share), *sizes)


def floor_power(size: int) -> int:
    """The largest power of 2 that is not above `size`: few numbers stand for all, so that answers are remembered."""
    return 1 << (size.bit_length() - 1)


@functools.cache
def load(threads: int) -> Table | None:
    """The table for that number of threads, read once per process; None where there is none that can be read."""
    file = table_file(threads)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return Table(tuple(read_point(point) for point in content["points"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning(
            "%s cannot be read (%s), so built-in limits choose the attention kernel; `mixhead doctor --tune` makes "
            "it anew.",
            file,
            error,
        )
        return None


def read_point(values: dict[str, object]) -> Point:
    """A point whose values are of the right types; raises a TypeError where they are not."""
    point = Point(**values)  # type: ignore[arg-type]
    types = {"str": str, "bool": bool, "int": int, "float": (int, float)}
    for field in fields(Point):
        if not isinstance(getattr(point, field.name), types[str(field.type)]):  # type: ignore[arg-type]
            raise TypeError(f"{field.name} is {getattr(point, field.name)!r}")
    return point


def store(points: Iterable[Point], threads: int) -> Path:
    """Keeps the points for this machine and number of threads, whole or not at all; `load` finds them from now on.

    Raises:
        MixheadError: where the cache cannot be written.
    """
    file = table_file(threads)
    content = {"machine": machine(threads), "points": [asdict(point) for point in points]}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix="crossover-") as folder:
            partial = Path(folder) / "table.json"
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            partial.replace(file)
    except OSError as error:
        raise MixheadError(
            f"What was measured cannot be kept in {file.parent} ({error.strerror or error}): name another folder with "
            "MIXHEAD_CACHE."
        ) from error
    load.cache_clear()
    return file


def table_file(threads: int) -> Path:
    """Where the table of this machine lies."""
    key = hashlib.sha256(json.dumps(machine(threads), sort_keys=True).encode()).hexdigest()[:16]
    return compiling.cache_directory() / f"crossover-{key}.json"


def machine(threads: int) -> dict[str, str | int]:
    """What a measured time depends on."""
    return {
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "instruction_set": best_level(),
        "kernel": sources_checksum(),
        "threads": threads,
    }


@functools.cache
def sources_checksum() -> str:
    """Of the kernel's sources: another kernel has other times."""
    sources = [file for file in sorted(compiling.SOURCES.iterdir()) if file.suffix in (".h", ".cpp")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16]


@functools.cache
def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
