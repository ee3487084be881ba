"""Ctrl-C and SIGTERM end a run after its step, with a checkpoint."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

logger = logging.getLogger(__name__)


class Interruptible(Protocol):
    """What can be asked to stop, and remembers by which signal."""

    interrupted: bool
    signal: int


@contextmanager
def signals_ask(trainer: Interruptible) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the run after the step, with a checkpoint; the second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: Any) -> None:
        del frame
        trainer.interrupted, trainer.signal = True, number
        restore()
        again = "press Ctrl-C again" if number == signal.SIGINT else "send SIGTERM again"
        logger.warning("Stopping after this step, with a checkpoint; %s to stop at once.", again)

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        restore()


def leave_signals(begin: Callable[[int], None], number: int) -> None:
    """Begins a process that reads data; signals, which terminals and schedulers send to all, end the one that trains.

    That one ends it in its turn, also by SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which tells who has sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_for_parent, daemon=True).start()
    begin(number)


def _end_for_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
