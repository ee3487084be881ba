"""Which process something belongs to, as a word in the name of a file, and whether that process has ended."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from pathlib import Path


def this_process() -> str:
    """PLACE.PID.START: the machine, the number of this process there, and when it began, since numbers come again."""
    return f"{_place()}.{os.getpid()}.{_started(os.getpid())}"


def has_ended(process: str) -> bool | None:
    """Whether the process of that word has ended; None where that cannot be known from here."""
    place, _, number = process.partition(".")
    pid, _, started = number.partition(".")
    if os.name != "posix" or place != _place() or not pid.isdecimal():
        return None
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it belongs to another user
        pass
    return _started(int(pid)) not in (started, "")


def _place() -> str:
    """The machine since it was started, and the name space in which processes have their numbers."""
    parts = [socket.gethostname()]
    boot = Path("/proc/sys/kernel/random/boot_id")
    with contextlib.suppress(OSError):  # no Linux
        parts += [boot.read_text(encoding="ascii"), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _started(pid: int) -> str:
    """When a process began, in ticks of the machine; "ended" where only its entry is left, "" where nobody can know."""
    try:
        # The name of the program, in parentheses, may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]
