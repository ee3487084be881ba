"""Peak memory of one run, in a process of its own: also what is allocated outside PyTorch counts."""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from mixhead.bench.subject import Spec
from mixhead.bench.timing import Call
from mixhead.errors import MixheadError

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def peak_memory(spec: Spec, engine: str, threads: int) -> float:
    """MiB of resident memory that one run adds at its peak to its inputs (and its weights).

    Memory that a process has used before is used again and would not be seen, so each measurement has a fresh process;
    they are forked from one that has loaded the libraries and computed nothing.

    Raises:
        MixheadError: where the process was ended, as when memory runs out.
    """
    context = multiprocessing.get_context("forkserver" if sys.platform.startswith("linux") else "spawn")
    if sys.platform.startswith("linux"):
        context.set_forkserver_preload([__name__, "mixhead.bench.core"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure_in_child, args=(sender, spec, engine, threads))  # type: ignore[attr-defined]
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = f"The process that measured the memory of {engine} was ended ({process.exitcode})."
    finally:
        if sys.exc_info()[0] is not None:
            process.terminate()
        process.join()
    if isinstance(answer, str):
        raise MixheadError(answer)
    return float(answer)


def measure_in_child(sender: Connection, spec: Spec, engine: str, threads: int) -> None:
    """Sends the MiB, or a sentence."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle.
    try:
        torch.set_num_threads(threads)
        spec.small().build().call(engine)()  # The libraries' own pages are no part of the run.
        call = spec.build().call(engine)
        give_back_freed()
        sender.send(growth(call))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def growth(call: Call) -> float:
    """MiB that a call adds at its peak to what is resident before it."""
    forget_peak()
    before = resident_mib()
    call()
    return max(0.0, peak_mib() - before)


def give_back_freed() -> None:
    """Returns what was freed to the system: a run that takes it again would not be seen to grow."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # another C library than GNU's
            ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> None:
    """Lets the peak begin anew, where the system can: making the inputs may have taken more than they hold."""
    with suppress(OSError):
        CLEAR.write_text("5")


def resident_mib() -> float:
    """What is resident now; where the system does not tell, the peak so far."""
    return kib_of("VmRSS") / 1024 if STATUS.exists() else peak_mib()


def peak_mib() -> float:
    """The most that has been resident."""
    if STATUS.exists():
        return kib_of("VmHWM") / 1024
    per_mib = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_mib


def kib_of(field: str) -> int:
    """A field of the process's status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])
