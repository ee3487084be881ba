"""The table that this process goes by: named, kept in the cache, shipped, or measured now.

A table belongs to an operator, a processor, an instruction set, a build of PyTorch, the kernel's sources and a number
of threads. It is looked up once per process; an operator that nobody calls is not measured. At most two are measured of
each in one process, for one thread and for more: whoever changes their number in the middle of a training gets the
nearest table, and no pause.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mixhead.errors import MixheadError
from mixhead.files import writing
from mixhead.ops.cpu import compiling
from mixhead.ops.cpu.level import best_level
from mixhead.ops.cpu.loading import available
from mixhead.ops.crossover.race import LONG, SHORT, Effort, Race, run_races
from mixhead.ops.crossover.table import Table

logger = logging.getLogger(__name__)

VARIABLE = "MIXHEAD_CROSSOVER"
SHIPPED = Path(__file__).parent / "tables"
EVERYTHING = "everything"  # the long measurement, of all operators
# Where an operator's kernel is: what is measured together, and not before it is needed.
LIBRARIES = {
    "attention": "attention",
    "projection": "projections",
    "slot projection": "projections",
    "aggregated attention": "aggregated",
    "glu": "convolutional_glu",
}

_lock = threading.RLock()
_measured: dict[tuple[str, bool], Table] = {}  # by library and whether there are several threads


@functools.cache
def table(operator: str, threads: int) -> Table:
    """The table of an operator for that number of threads, looked up or measured once per process."""
    library = LIBRARIES[operator]
    with _lock:
        return named() or kept(library, threads) or nearest(library, threads) or measure_once(library, threads)


def forget() -> None:
    """The next call looks again."""
    with _lock:
        table.cache_clear()
        _measured.clear()


def named() -> Table | None:
    """The table that the environment names; a user who names one wants no other.

    Raises:
        MixheadError: where it cannot be read.
    """
    file = os.environ.get(VARIABLE)
    if not file:
        return None
    try:
        return Table.from_json(Path(file).read_text(encoding="utf-8"), f"measured ({VARIABLE})")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MixheadError(
            f"{VARIABLE} names {file}, which cannot be read as measured cross-overs ({error}): `mixhead doctor --tune` "
            "writes such a file, and without the variable this processor is measured."
        ) from error


def kept(library: str, threads: int) -> Table | None:
    """A long measurement of this machine, one that came with mixhead, or a short one, in this order."""
    return (
        read(file_of(EVERYTHING, threads), "measured at length on this machine")
        or shipped(threads)
        or read(file_of(library, threads), "measured on this machine")
    )


def nearest(library: str, threads: int) -> Table | None:
    """What was measured with another number of threads, but not with one instead of several."""
    if threads == 1:
        return _measured.get((library, False))
    for name in (EVERYTHING, library):
        pattern = re.compile(rf"crossover-{key()}-{name}-(\d+)\.json")
        found = [int(m[1]) for file in folder_entries() if (m := pattern.fullmatch(file.name)) and int(m[1]) > 1]
        for other in sorted(found, key=lambda count: abs(count - threads)):
            if (near := read(file_of(name, other), "measured on this machine")) is not None:
                return near
    return _measured.get((library, True))


def shipped(threads: int) -> Table | None:
    """The table of this processor that came with mixhead, if there is one."""
    return read(SHIPPED / f"{slug(cpu_model())}-{best_level()}-{min(threads, 2)}.json", "shipped, measured")


def slug(name: str) -> str:
    """The name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def measure_once(library: str, threads: int) -> Table:
    """Measures for a few seconds and keeps the result; processes that need it at the same time wait for one."""
    file = file_of(library, threads)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with compiling.one_process_at_a_time(file.with_suffix(".lock")):
            found = read(file, "measured on this machine")
            if found is None:
                logger.warning("Measuring which engines are fast on this processor, once, in a few seconds: %s", file)
                found = measure(SHORT, [library])
                keep(found, file)
    except (OSError, compiling.BuildError) as error:
        logger.warning("What is fast on this processor is measured for this process alone: %s", error)
        found = measure(SHORT, [library])
    _measured[library, threads > 1] = found
    return found


def keep(found: Table, file: Path) -> None:
    """Writes what was measured for later processes, unless so little was that the machine must have been busy."""
    if found.left_out > len(found.points):
        logger.warning(
            "There was time for %d of %d measurements alone, so the next process measures again; `mixhead doctor "
            "--tune` measures at length, once and for good.",
            len(found.points),
            len(found.points) + found.left_out,
        )
    else:
        write(found, file)


def measure(
    effort: Effort,
    libraries: Iterable[str],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Table:
    """Measures with as many threads as PyTorch is set to; nothing is kept."""
    built = {library: available(library)[0] for library in libraries}
    points, left_out = run_races(lambda: races(built, effort.thorough), effort, on_progress)
    today = time.strftime("%Y-%m-%d")
    return Table(tuple(points), machine(torch.get_num_threads()), today, "measured on this machine", left_out)


def measure_at_length(on_progress: Callable[[int, int], None]) -> tuple[Table, Path]:
    """The long measurement, which wins over all others from now on. Returns it and the file that keeps it.

    Raises:
        MixheadError: where the cache cannot be written.
    """
    libraries = tuple(dict.fromkeys(LIBRARIES.values()))
    found = completed(measure(LONG, libraries, on_progress), lambda: measure(SHORT, libraries))
    file = file_of(EVERYTHING, torch.get_num_threads())
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(found, file)
    except OSError as error:
        raise MixheadError(
            f"What was measured cannot be kept in {file.parent} ({error.strerror or error}): name another folder with "
            "MIXHEAD_CACHE."
        ) from error
    forget()
    return found, file


def completed(long: Table, short: Callable[[], Table]) -> Table:
    """A long measurement on a machine too slow for all of it, with what it did not come to from a short one."""
    if not long.left_out:
        return long
    kinds = {(p.operator, p.engine, p.kind) for p in long.points}
    others = tuple(p for p in short().points if (p.operator, p.engine, p.kind) not in kinds)
    return replace(long, points=(*long.points, *others))


def races(built: dict[str, bool], thorough: bool) -> Iterator[Race]:
    """The races of some libraries, and whether their kernels are built.

    They are imported here, since each operator chooses by what they measure.
    """
    from mixhead.ops.crossover import attention, images, projections

    of_library = {
        "attention": attention.races,
        "projections": projections.races,
        "aggregated": images.races_of_aggregated,
        "convolutional_glu": images.races_of_glu,
    }
    for gradient in (False, True):
        for library, kernel in built.items():
            yield from of_library[library](kernel, gradient, thorough)


def read(file: Path, origin: str) -> Table | None:
    """The table in a file; None where there is none, or none that can be read, which is told."""
    try:
        return Table.from_json(file.read_text(encoding="utf-8"), origin)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("%s cannot be read (%s), so it is measured anew.", file, error)
        return None


def write(found: Table, file: Path) -> None:
    """Writes the table whole or not at all."""
    with writing(file) as partial:
        partial.write_text(found.to_json(), encoding="utf-8")


def file_of(name: str, threads: int) -> Path:
    """Where a table of this machine lies."""
    return compiling.cache_directory() / f"crossover-{key()}-{name}-{threads}.json"


def folder_entries() -> list[Path]:
    """What lies in the cache."""
    try:
        return list(compiling.cache_directory().iterdir())
    except OSError:
        return []


def key() -> str:
    """One word for everything but the threads that a time depends on."""
    without_threads = {name: value for name, value in machine(0).items() if name != "threads"}
    return hashlib.sha256(json.dumps(without_threads, sort_keys=True).encode()).hexdigest()[:16]


def machine(threads: int) -> dict[str, str | int]:
    """What a measured time depends on."""
    return {
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "instruction_set": best_level(),
        "stock": torch.backends.cpu.get_cpu_capability(),
        "kernel": sources_checksum() if available()[0] else "none",
        "threads": threads,
    }


@functools.cache
def sources_checksum() -> str:
    """Of the kernel's sources: another kernel has other times."""
    sources = [file for file in sorted(compiling.SOURCES.iterdir()) if file.suffix in (".h", ".cpp")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16]


@functools.cache
def cpu_model() -> str:
    """The processor's name, with its generation: on virtual machines "AMD EPYC" is all that many of them say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    if "model name" not in told:
        return platform.processor() or platform.machine()
    numbers = [f"{word} {told[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in told]
    return f"{told['model name']} ({', '.join(numbers)})" if numbers else told["model name"]
