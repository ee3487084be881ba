"""Timing by taking turns: what is compared runs in one process, one after the other, round after round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds of one call, an entry a round: on the wall, and of all of the process's threads together."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def wall_ms(self) -> float:
        """The median in milliseconds."""
        return statistics.median(self.wall) * 1e3

    @property
    def cpu_ms(self) -> float:
        """The median in milliseconds."""
        return statistics.median(self.cpu) * 1e3


@dataclass(frozen=True)
class Ratio:
    """How many times faster than a baseline: the median over the rounds, by both clocks. Above 1 is faster."""

    wall: float
    cpu: float


def race(calls: Sequence[Call], rounds: int, seconds: float) -> list[Times]:
    """Times every call once a round, in the order given, after each ran once to warm up.

    Args:
        calls: what is compared, the baseline first.
        rounds: how often each is timed.
        seconds: the least time of one measurement of the baseline; short calls are repeated, all equally often.
    """
    warm_up = [timed(call, 1)[0] for call in calls]
    repeats = 1
    if warm_up[0] < 10 * seconds:
        repeats = max(1, int(seconds / max(timed(calls[0], 1)[0], 1e-6)))
    measured: list[list[tuple[float, float]]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, measured, strict=True):
            times.append(timed(call, repeats))
    return [Times(tuple(w for w, _ in times), tuple(c for _, c in times)) for times in measured]


def timed(call: Call, repeats: int) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


def ratio(baseline: Times, ours: Times) -> Ratio:
    """(time of the baseline) / (time of ours), the median over the rounds."""
    return Ratio(quotient(baseline.wall, ours.wall), quotient(baseline.cpu, ours.cpu))


def quotient(baseline: Sequence[float], ours: Sequence[float]) -> float:
    """The median over the rounds of baseline / ours."""
    return statistics.median(b / max(o, 1e-12) for b, o in zip(baseline, ours, strict=True))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch computes with that many threads inside, and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
