"""What was measured on a processor, and up to which share of the heads an engine is taken there.

A point is one race of an engine against the dense computation. Points that differ in size and width alone make a grid;
between the measured sizes and widths an engine is taken where it won at all neighbours, above them where it won at the
largest, and below them never. Fewer selected heads can only help, so a race that is won need not be run at a smaller
share.
"""

from __future__ import annotations

import functools
import json
from bisect import bisect_left, bisect_right
from dataclasses import asdict, dataclass, field, fields

# What an engine must gain in a race to be taken there: in doubt the dense computation is, which is never wrong.
MARGIN = 1.03


@dataclass(frozen=True)
class Point:
    """One race.

    Attributes:
        operator: "attention", "projection", "slot projection", "aggregated attention" or "glu".
        engine: the implementation that raced against the dense one.
        kind: what is computed, e.g. "float32 causal gradient": everything that is not a number.
        width: of a head (or of an expert, or channels).
        size: queries; keys where the kind is "cache"; rows or tokens of the other operators.
        share: of the heads, how many a token used.
        ratio: (time of the dense computation, gates included) / (time of the engine).
        bare: likewise without the gates, which a compiled graph computes on the way.
    """

    operator: str
    engine: str
    kind: str
    width: int
    size: int
    share: float
    ratio: float
    bare: float


@dataclass(frozen=True)
class Verdict:
    """Up to which share of the heads an engine is taken (0: never), and the race that decided."""

    share: float
    decisive: Point | None = None


Grid = dict[int, dict[int, list[Point]]]  # by width, by size: the points of falling shares


@dataclass(frozen=True, eq=False)
class Table:
    """All points of one processor, kernel and number of threads.

    Attributes:
        points: what was measured.
        machine: what the times depend on.
        date: when.
        origin: where the table comes from, in words.
        left_out: how many races there was no time for.
    """

    points: tuple[Point, ...]
    machine: dict[str, str | int] = field(default_factory=dict)
    date: str = ""
    origin: str = ""
    left_out: int = 0

    @functools.cached_property
    def grids(self) -> dict[tuple[str, str, str], Grid]:
        """The points, sorted for looking up."""
        found: dict[tuple[str, str, str], Grid] = {}
        for point in sorted(self.points, key=lambda p: (p.width, p.size, -p.share)):
            grid = found.setdefault((point.operator, point.engine, point.kind), {})
            grid.setdefault(point.width, {}).setdefault(point.size, []).append(point)
        return found

    @functools.cache  # noqa: B019  # one table lives as long as the process
    def verdict(
        self, operator: str, engine: str, kind: str, width: int | None, size: int | None, fused: bool = False
    ) -> Verdict:
        """Up to which share the engine is taken at a width and a size.

        Args:
            operator: see `Point`.
            engine: see `Point`.
            kind: see `Point`.
            width: None where a compiled graph serves all widths.
            size: None where a compiled graph serves all sizes.
            fused: whether the gates cost the dense computation nothing.
        """
        grid = self.grids.get((operator, engine, kind))
        if grid is None:
            return Verdict(0.0)
        widths = grid if width is None else neighbours(sorted(grid), width)
        sizes = {w: sizes_of_graphs(grid[w]) if size is None else neighbours(sorted(grid[w]), size) for w in widths}
        if not sizes or not all(sizes.values()):
            return Verdict(0.0)
        cells = [cell_verdict(grid[w][s], fused) for w in sizes for s in sizes[w]]
        return min(cells, key=lambda cell: (cell.share, cell.decisive.ratio if cell.decisive else 0.0))

    def basis(self) -> str:
        """When and on what it was measured, in words."""
        threads = self.machine.get("threads", "?")
        return (
            f"{self.origin} {self.date}, {self.machine.get('cpu', '?')}, {self.machine.get('instruction_set', '?')}, "
            f"{threads} thread{'' if threads == 1 else 's'}"
        )

    def to_json(self) -> str:
        """As a file."""
        head = {"date": self.date, "machine": self.machine, "left_out": self.left_out}
        lines = ",\n".join("  " + json.dumps(list(asdict(point).values())) for point in self.points)
        names = json.dumps([f.name for f in fields(Point)])
        return json.dumps(head)[:-1] + f',\n "columns": {names},\n "points": [\n{lines}\n ]}}\n'

    @classmethod
    def from_json(cls, text: str, origin: str) -> Table:
        """Reads what `to_json` wrote; raises ValueError, KeyError or TypeError where it is something else."""
        content = json.loads(text)
        points = tuple(read_point(values) for values in content["points"])
        return cls(points, dict(content["machine"]), str(content["date"]), origin, int(content["left_out"]))


GRAPH_MIN_SIZE = 64


def sizes_of_graphs(by_size: dict[int, list[Point]]) -> set[int]:
    """The sizes that judge for a graph that serves all of them: few tokens cost little either way."""
    return {size for size in by_size if size >= GRAPH_MIN_SIZE} or {max(by_size)}


def cell_verdict(points: list[Point], fused: bool) -> Verdict:
    """The largest share at which the race was won; points by falling share."""
    won = next((p for p in points if (p.bare if fused else p.ratio) >= MARGIN), None)
    return Verdict(0.0, points[-1]) if won is None else Verdict(won.share, won)


def neighbours(measured: list[int], value: int) -> set[int]:
    """The measured numbers next to a value: itself, or below and above; the largest where it is above them all.

    None where it is below them all: what is small differs from what is large in kind.
    """
    below, above = bisect_right(measured, value) - 1, bisect_left(measured, value)
    return set() if below < 0 else {measured[below], measured[min(above, len(measured) - 1)]}


def kind_of(dtype: str, causal: bool = False, masked: bool = False, gradient: bool = False, cache: bool = False) -> str:
    """What distinguishes calls, beside sizes, in words; a cache is a few queries against more keys."""
    words = (dtype, "causal" if causal else "", "masked" if masked else "", "gradient" if gradient else "")
    return " ".join(word for word in (*words, "cache" if cache else "") if word)


def inside(bits: int) -> int:
    """A size between the smallest and the largest of so many binary digits, so that both neighbours are asked."""
    return 1 if bits <= 1 else 3 << (bits - 2)


def read_point(values: list[object]) -> Point:
    """A point whose values are of the right types; raises a TypeError where they are not."""
    point = Point(*values)  # type: ignore[arg-type]
    types = {"str": str, "int": int, "float": (int, float)}
    for column in fields(Point):
        if not isinstance(getattr(point, column.name), types[str(column.type)]):  # type: ignore[arg-type]
            raise TypeError(f"{column.name} is {getattr(point, column.name)!r}")
    return point
