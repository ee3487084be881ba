"""Races: an engine and the dense computation take turns, and the best time of each counts.

All run in a thread of their own, where nothing that the caller has switched on (autocast, inference mode, another
default device) holds, and with random numbers of their own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from mixhead.ops.crossover.table import MARGIN, Point, Table

Call = Callable[[], object]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    Attributes:
        rounds: how often each call takes its turn.
        seconds: the least time of one turn.
        budget_s: seconds after which nothing more is begun, by the clock that the calls are timed with.
        thorough: whether the large sizes and all shares are measured too.
    """

    rounds: int
    seconds: float
    budget_s: float
    thorough: bool


SHORT = Effort(rounds=3, seconds=0.0005, budget_s=4.0, thorough=False)
LONG_CALL_S = 0.0015  # of such calls fewer rounds are enough
LONG = Effort(rounds=5, seconds=0.002, budget_s=400.0, thorough=True)


@dataclass(frozen=True)
class Race:
    """What is to be measured.

    Attributes:
        operator: see `Point`.
        engine: see `Point`.
        kind: see `Point`.
        width: see `Point`.
        size: see `Point`.
        shares: falling; those behind the first that is won are left out.
        runs: for a share, the calls that are timed, several where the worst of them counts: each the engine, the dense
            computation, and that without its gates where it has any.
        unless_won_by: an engine that is preferred: where it wins, this race is left out.
    """

    operator: str
    engine: str
    kind: str
    width: int
    size: int
    shares: tuple[float, ...]
    runs: Callable[[float], Iterable[tuple[Call, ...]]]
    unless_won_by: str | None = None


class Stopped(Exception):
    """Nobody waits for the result any more."""


def run_races(
    races: Callable[[], Iterable[Race]],
    effort: Effort,
    on_progress: Callable[[int, int], None] = lambda done, all: None,
) -> tuple[list[Point], int]:
    """Runs all races with as many threads as PyTorch is set to. Returns the points, and how many had no time left."""
    stop = threading.Event()
    points: list[Point] = []
    left_out = 0

    def work() -> None:
        nonlocal left_out
        clock = clock_for(torch.get_num_threads())
        begin = clock()
        plan = list(races())
        for done, race in enumerate(plan):
            on_progress(done, len(plan))
            if stop.is_set():
                raise Stopped
            if clock() - begin > effort.budget_s:
                left_out = len(plan) - done
                break
            if not (race.unless_won_by and won_before(race, points)):
                points.extend(run_race(race, effort))
        on_progress(len(plan), len(plan))

    try:
        in_a_thread(work)
    finally:
        stop.set()
    return points, left_out


def won_before(race: Race, points: list[Point]) -> bool:
    """Whether the preferred engine is taken there at every share that this race would measure."""
    verdict = Table(tuple(points)).verdict(race.operator, race.unless_won_by or "", race.kind, race.width, race.size)
    return verdict.share >= max(race.shares)


def run_race(race: Race, effort: Effort) -> Iterator[Point]:
    """The points of one race, until the engine wins; shares at which it could not win yet are left out."""
    hoped = MARGIN  # if the engine's time were in proportion to the heads, and a little more
    for share in race.shares:
        if hoped / share < MARGIN and not effort.thorough:
            continue
        ratio = bare = float("inf")
        for calls in race.runs(share):
            ours, dense, *without_gates = best_times(calls, effort)
            ratio, bare = min(ratio, dense / ours), min(bare, (without_gates or [dense])[0] / ours)
        yield Point(
            race.operator, race.engine, race.kind, race.width, race.size, share, round(ratio, 3), round(bare, 3)
        )
        hoped = 1.15 * ratio * share
        if ratio >= MARGIN and not effort.thorough:
            return


def best_times(calls: Iterable[Call], effort: Effort) -> list[float]:
    """The best time of each call in seconds: of the thread where PyTorch has one, else by the wall clock."""
    clock = clock_for(torch.get_num_threads())
    calls = list(calls)
    for call in calls:
        call()
    start = clock()
    calls[0]()
    once = max(clock() - start, 1e-6)
    repeats = max(1, int(effort.seconds / once))
    best = [float("inf")] * len(calls)
    for _ in range(effort.rounds if once < LONG_CALL_S else max(2, effort.rounds - 1)):
        for index, call in enumerate(calls):
            start = clock()
            for _ in range(repeats):
                call()
            best[index] = min(best[index], max(clock() - start, 1e-9) / repeats)
    return best


def clock_for(threads: int) -> Callable[[], float]:
    """The time of this thread survives a busy machine; it knows nothing of other threads, and may be coarse."""
    if threads == 1 and time.get_clock_info("thread_time").resolution < 1e-5:
        return time.thread_time
    return time.perf_counter


def in_a_thread(work: Callable[[], Result]) -> Result:
    """What `work` returns or raises, run in a new thread. Ctrl-C ends the wait at once."""
    outcome: list[Result] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="mixhead-measures", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
