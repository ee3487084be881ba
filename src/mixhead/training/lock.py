"""One run in a folder at a time."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from mixhead.errors import MixheadError

logger = logging.getLogger(__name__)

LOCK = ".lock"


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Holds the lock of a run's folder within the block.

    The operating system holds it for this process and lets go when the process ends, however that happens, also on
    another machine that shares the folder: no lock is ever stale, whatever file one left behind.

    Raises:
        MixheadError: where another run works in the folder, or it cannot be written to.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise MixheadError(f"The folder of the run, {folder}, cannot be written to ({error}).") from error
    held = [descriptor]

    def close() -> None:
        while held:
            os.close(held.pop())

    os.register_at_fork(after_in_child=close)  # children read data, and may outlive a process that is killed
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        close()
        raise in_use(folder) from None
    except OSError as error:
        logger.warning("%s lies where files cannot be locked (%s): see that only one run uses it.", folder, error)
    try:
        with contextlib.suppress(OSError):  # what it says is for people alone
            os.ftruncate(descriptor, 0)
            now = datetime.now().isoformat(" ", "minutes")
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode())
        yield
    finally:
        close()


def check_unused(folder: Path) -> None:
    """Raises where another run works in a folder, before models and data are read for one that cannot begin."""
    if os.environ.get("RANK", "0") == "0" and (folder / LOCK).is_file():
        with only_run_in(folder):
            pass


def in_use(folder: Path) -> MixheadError:
    """The error to raise for a folder in which another run works."""
    holder = (folder / LOCK).read_text(encoding="utf-8", errors="replace").strip() or "another process"
    return MixheadError(
        f"{folder} is in use by another run ({holder}), which would lose its log and its checkpoints: wait for its "
        "end, or give another folder."
    )
