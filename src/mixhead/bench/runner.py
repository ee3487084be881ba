"""Runs what is to be measured, row by row: first right, then fast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from mixhead.bench.cases import Case, Figure
from mixhead.bench.core import CoreSpec
from mixhead.bench.memory import peak_memory
from mixhead.bench.results import OK, SKIPPED, WRONG, Row
from mixhead.bench.subject import MASKED, SDPA, Spec, Subject
from mixhead.bench.timing import race, ratio, threads
from mixhead.errors import MixheadError


@dataclass(frozen=True)
class Entry:
    """One row to measure.

    Attributes:
        spec: what is built.
        engine: what it runs under.
        threads: of PyTorch.
        required: the ratio to reach, if there is one.
        required_of_gated: whether that ratio is to dense attention followed by the gates.
    """

    spec: Spec
    engine: str
    threads: int
    required: float | None = None
    required_of_gated: bool = False


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        rounds: how often everything that is compared takes its turn; the median counts.
        seconds: the least time of one measurement.
        memory: whether to measure peak memory too, each in a process of its own.
    """

    rounds: int = 7
    seconds: float = 0.02
    memory: bool = True


def entries_of_figures(figures: Iterable[Figure], engines: list[str], counts: list[int]) -> Iterator[Entry]:
    """A row for every figure to reach."""
    for figure in figures:
        for share, required in figure.required.items():
            spec = CoreSpec(figure.case, figure.dtype, figure.routing, share)
            for count in counts:
                for engine in engines:
                    yield Entry(spec, engine, count, required, figure.gated)


def entries_of_specs(specs: Iterable[Spec], engines: list[str], counts: list[int]) -> Iterator[Entry]:
    """A row for every spec, number of threads and engine."""
    for spec in specs:
        for count in counts:
            for engine in engines:
                yield Entry(spec, engine, count)


def run(
    entries: list[Entry], options: Options, on_row: Callable[[Row], None], on_progress: Callable[[int, int], None]
) -> None:
    """Measures all entries in order.

    Args:
        entries: the rows to measure; neighbours with the same spec and threads share what is built.
        options: how.
        on_row: called with every row as soon as it is measured.
        on_progress: called with (done, all).
    """
    done = 0
    on_progress(done, len(entries))
    for (spec, count), group in groupby(entries, key=lambda entry: (entry.spec, entry.threads)):
        with threads(count):
            subject = spec.build()
            dense_mib: float | None = None
            for entry in group:
                row = measure(subject, entry, options)
                if options.memory and row.status == OK:
                    try:
                        dense_mib = peak_memory(spec, SDPA, count) if dense_mib is None else dense_mib
                        mib = peak_memory(spec, entry.engine, count)
                        row = replace(row, memory_mib=mib, dense_memory_mib=dense_mib)
                    except MixheadError as failure:
                        row = replace(row, note=str(failure))
                on_row(row)
                done += 1
                on_progress(done, len(entries))


def measure(subject: Subject, entry: Entry, options: Options) -> Row:
    """One row, without its memory. A wrong result is not timed; an engine that refuses is skipped."""
    spec = entry.spec
    row = Row(
        spec.subject, spec.direction, spec.title, spec.dtype, spec.routing, spec.share, entry.threads, entry.engine,
        required=entry.required, required_of_gated=entry.required_of_gated,
    )  # fmt: skip
    try:
        error = subject.error(entry.engine)
        if not error <= subject.tolerance:
            note = f"error {error:.1e} above {subject.tolerance:.0e}"
            return replace(row, status=WRONG, note=note, error=error, reached=None if entry.required is None else False)
        # A whole model takes too long for a second baseline; masking has a row of its own.
        names = [SDPA, entry.engine] if spec.subject == "model" else [SDPA, entry.engine, MASKED]
        times = race([subject.call(name) for name in names], options.rounds, options.seconds)
    except MixheadError as refusal:
        return replace(row, status=SKIPPED, note=str(refusal))
    dense, ours = times[:2]
    row = replace(
        row,
        error=error,
        dense=ratio(dense, ours),
        gated=ratio(times[2], ours) if len(times) > 2 else None,
        wall_ms=ours.wall_ms,
        cpu_ms=ours.cpu_ms,
    )
    if entry.required is None:
        return row
    counts = row.judged
    assert counts is not None
    # With one thread CPU time is the steadier clock; with several, only the wall shows what they gain.
    return replace(row, reached=(counts.cpu if entry.threads == 1 else counts.wall) >= entry.required)


def grid(
    batches: list[int], tokens: list[int], masks: list[bool], directions: list[str], shape: Case
) -> Iterator[Case]:
    """Cases of every batch, length, mask and direction ("forward", "backward" or "decode"), with the heads of `shape`.

    In decoding the length is the number of cached keys.
    """
    for direction in directions:
        for batch in batches:
            for count in tokens:
                if direction == "decode":
                    yield replace(shape, batch=batch, tokens=1, keys=count, causal=True)
                    continue
                for causal in masks:
                    backward = direction == "backward"
                    yield replace(shape, batch=batch, tokens=count, causal=causal, backward=backward)
