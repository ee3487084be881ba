"""What was measured, in a sentence."""

from __future__ import annotations

from mixhead.ops.crossover.table import MARGIN, Point, Table, Verdict

ENGINES = {
    "cpu": "the C++ kernel",
    "slots": "packing heads into slots",
    "gathered": "gathering the rows of each head",
}
DENSE = {
    "attention": "the stock kernel on all heads",
    "projection": "one product over all heads",
    "slot projection": "one product over all experts",
    "aggregated attention": "plain PyTorch on all heads",
    "glu": "plain PyTorch",
}


def sentence(operator: str, engine: str, kind: str, verdict: Verdict, table: Table, fused: bool = False) -> str:
    """Why an engine is taken, or not: the race that decided, when it was run and on what."""
    point, name = verdict.decisive, ENGINES[engine]
    if point is None:
        return f"{name} was not measured for this ({kind}; {table.basis()})"
    ratio = point.bare if fused else point.ratio
    where = f"{place(point)}; {table.basis()}"
    if ratio < MARGIN:
        return f"{name} ran at {ratio:.2f} of the speed of {DENSE[operator]} ({where})"
    limit = "" if verdict.share >= 1.0 else ", and is taken up to that share"
    return f"{name} ran at {ratio:.2f} times the speed of {DENSE[operator]}{limit} ({where})"


def place(point: Point) -> str:
    """What was raced on, in words."""
    unit = "cached keys" if point.kind.endswith("cache") else "tokens"
    return f"{point.kind}, {point.size:,} {unit}, width {point.width}, {point.share:.0%} of the heads"
