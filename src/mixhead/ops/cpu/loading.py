"""Loads the compiled kernels: those that came with the package, or those that were compiled here."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from mixhead.ops.constant import constant_when_compiled
from mixhead.ops.cpu import compiling
from mixhead.ops.cpu.compiling import LIBRARIES, BuildError
from mixhead.ops.cpu.level import best_level
from mixhead.routing import one_operator

logger = logging.getLogger(__name__)

# In a wheel, the libraries for the processors that it is made for.
PACKAGED = Path(__file__).parent / "library"


@dataclass(frozen=True)
class Outcome:
    """Whether a library is loaded, and a sentence about it."""

    built: bool
    reason: str
    level: str | None = None  # the instruction set, where it is loaded


_lock = threading.Lock()
_outcomes: dict[str, Outcome] = {}


@constant_when_compiled
def available(name: str = "attention") -> tuple[bool, str]:
    """Whether the kernels of a library can run, and why (not).

    The first call in a process loads the library, and compiles it if need be.

    Args:
        name: a key of `LIBRARIES`.

    Raises:
        MixheadError: where MIXHEAD_CPU_LEVEL names an instruction set that this processor does not have.
    """
    outcome = _outcomes.get(name) or load(name)
    return outcome.built, outcome.reason


def loaded_level() -> str | None:
    """The instruction set for which the attention has been loaded; loads nothing."""
    outcome = _outcomes.get("attention")
    return None if outcome is None else outcome.level


def build() -> tuple[bool, str]:
    """Compiles and loads all kernels ahead of their first use. Returns what `available` does, of the first failure."""
    results = [available(name) for name in LIBRARIES]
    return next((result for result in results if not result[0]), results[0])


def load(name: str) -> Outcome:
    """Loads a library once per process. After one that cannot be had no other is tried: the reason is logged once."""
    with _lock:
        if name not in _outcomes:
            failed = next((outcome for outcome in _outcomes.values() if not outcome.built), None)
            _outcomes[name] = failed or load_now(name)
        return _outcomes[name]


def load_now(name: str) -> Outcome:
    """Loads a library, or logs why not."""
    level = best_level()
    try:
        if not load_packaged(level):
            load_compiled(name, level)
    except BuildError as error:
        reason = f"the C++ kernel is not available: {error}"
        logger.warning("%s Portable PyTorch is used instead.", sentence(reason))
        return Outcome(False, reason)
    one_operator.is_loaded.cache_clear()
    return Outcome(True, f"the C++ kernel for {level} is loaded", level)


def load_packaged(level: str) -> bool:
    """Whether the kernels came with the package and are loaded now."""
    path = PACKAGED / f"kernels-{level}.so"  # all families in one
    if not path.exists():
        return False
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        logger.warning("%s It is compiled instead.", sentence(f"the kernel in the package does not load: {error}"))
        return False
    return True


def load_compiled(name: str, level: str) -> None:
    """Loads a library from the cache. One that is whole and does not load was made elsewhere: it is made anew once.

    Raises:
        BuildError: where the library cannot be made, or what was just made does not load.
    """
    path = compiling.library(name, level)
    try:
        torch.ops.load_library(str(path))
    except OSError:
        compiling.forget(path)
        try:
            torch.ops.load_library(str(compiling.library(name, level)))
        except OSError as error:
            raise BuildError(f"it was compiled and does not load ({error})") from error


def sentence(text: str) -> str:
    """The text with a capital letter and a full stop."""
    return text[:1].upper() + text[1:].rstrip(". \n") + "."
