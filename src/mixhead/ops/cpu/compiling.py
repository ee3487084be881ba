"""Compiles the kernel on first use and keeps it in the user's cache.

A build is known by the version of PyTorch, the instruction set, the C library, the compiler's flags and the sources: a
cache that several machines share holds one build for each kind. One process compiles while the others wait; a build
appears in the cache whole or not at all, and one whose checksum does not fit is made anew.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mixhead.errors import MixheadError

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "source"
# The stable ABI of the oldest PyTorch that is supported: one library serves that version and every later one.
TARGET = "-DTORCH_TARGET_VERSION=0x020d000000000000"
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-w", TARGET)
TIMEOUT_S = 600

# Instruction sets, the best first, with the flags that let the compiler use them.
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma")
LEVELS = {
    "amx": (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512_bf16": (*AVX512, "-mavx512bf16"),
    "avx512": AVX512,
    "avx2": ("-mavx2", "-mfma"),
    "plain": (),
}


@dataclass(frozen=True)
class Outcome:
    """Whether the kernel is loaded, and a sentence about it."""

    built: bool
    reason: str
    level: str | None = None  # the instruction set, where it is loaded


_lock = threading.Lock()
_outcome: Outcome | None = None


class BuildError(Exception):
    """The kernel cannot be had; the message is a sentence."""


@torch.compiler.assume_constant_result
def available() -> tuple[bool, str]:
    """Whether the kernel can run, and why (not). The first call in a process loads it, and compiles it if need be."""
    outcome = _outcome or load()
    return outcome.built, outcome.reason


def loaded_level() -> str | None:
    """The instruction set for which the kernel has been loaded; loads nothing."""
    return None if _outcome is None else _outcome.level


def build() -> tuple[bool, str]:
    """Compiles and loads the kernel ahead of its first use. Returns what `available` returns."""
    return available()


def load() -> Outcome:
    """Loads the kernel once per process; a failure is logged once and remembered."""
    global _outcome
    with _lock:
        if _outcome is None:
            try:
                level = best_level()
                torch.ops.load_library(str(library(level)))
                _outcome = Outcome(True, f"the C++ kernel for {level} is loaded", level)
            except (BuildError, OSError) as error:
                _outcome = Outcome(False, f"the C++ kernel is not available: {error}")
                logger.warning("%s Portable PyTorch is used instead.", sentence(_outcome.reason))
        return _outcome


def sentence(text: str) -> str:
    """The text with a capital letter and a full stop."""
    return text[:1].upper() + text[1:].rstrip(". \n") + "."


@torch.compiler.assume_constant_result
def best_level() -> str:
    """The best instruction set of this CPU that PyTorch may use; MIXHEAD_CPU_LEVEL names another one."""
    return detect_level()


@functools.cache
def detect_level() -> str:
    """What `best_level` returns, found out once per process."""
    if wanted := os.environ.get("MIXHEAD_CPU_LEVEL"):
        if wanted not in LEVELS:
            raise MixheadError(f"MIXHEAD_CPU_LEVEL is {wanted!r}, not one of {', '.join(LEVELS)}.")
        return wanted
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine().lower() not in ("x86_64", "amd64") or capability not in ("AVX512", "AVX2"):
        return "plain"
    if capability == "AVX2":
        return "avx2"
    if not can("_is_avx512_bf16_supported"):
        return "avx512"
    # The operating system lends the matrix units to processes that ask, and may refuse.
    return "amx" if can("_is_amx_tile_supported") and can("_init_amx") else "avx512_bf16"


def can(name: str) -> bool:
    """What PyTorch says about the CPU; False where this version of it does not say."""
    ask = getattr(torch.cpu, name, None)
    return ask is not None and bool(ask())


def cache_directory() -> Path:
    """MIXHEAD_CACHE, or mixhead in XDG_CACHE_HOME, or in ~/.cache."""
    if own := os.environ.get("MIXHEAD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixhead"


def library(level: str) -> Path:
    """Path of the compiled kernel for an instruction set, whole and checked; compiles it where there is none.

    Raises:
        BuildError: without a compiler, where compiling fails or the cache cannot be written.
    """
    command = compile_command(level)
    sources = [file for file in sorted(SOURCES.iterdir()) if file.suffix in (".h", ".cpp")]
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sources]
    known_by = [torch.__version__, level, platform.machine(), *platform.libc_ver(), *command[1:], *contents]
    key = hashlib.sha256("\n".join(known_by).encode()).hexdigest()[:16]
    path = cache_directory() / "kernels" / f"attend-torch{torch.__version__}-{level}-{key}.so"
    if is_whole(path):
        return path
    if shutil.which(command[0]) is None:
        raise BuildError("no C++ compiler was found (c++, g++ or clang++, or the one that CXX names)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with one_process_at_a_time(path.with_suffix(".lock")):
            if not is_whole(path):
                logger.warning("Compiling the attention kernel for %s, once, in about a minute: %s", level, path)
                compile_into(path, command)
    except OSError as error:
        raise BuildError(f"it cannot be kept in {path.parent} ({error}); MIXHEAD_CACHE names another folder") from error
    return path


def compile_command(level: str) -> list[str]:
    """The compiler and its arguments, without files."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((c for c in candidates if shutil.which(c)), candidates[0])
    home = Path(torch.__file__).parent
    return [
        compiler,
        *FLAGS,
        *(LEVELS[level] if platform.machine().lower() in ("x86_64", "amd64") else ()),
        f"-I{home / 'include'}",
    ]


def compile_into(path: Path, command: list[str]) -> None:
    """Compiles beside `path`, all sources at once, and moves the result there in one step, its checksum first."""
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as folder, ThreadPoolExecutor() as pool:
        objects = {source: Path(folder) / f"{source.stem}.o" for source in sorted(SOURCES.glob("*.cpp"))}
        list(pool.map(lambda source: compile_file([*command, "-c", str(source)], objects[source]), objects))
        made = Path(folder) / "kernel.so"
        compile_file([*command, "-shared", *map(str, objects.values()), *libraries], made)
        checksum = Path(folder) / "checksum"
        checksum.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        checksum.replace(path.with_suffix(".sha256"))
        made.replace(path)


def compile_file(command: list[str], out: Path) -> None:
    """Runs the compiler; a `BuildError` says what it said."""
    try:
        run = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took longer than {TIMEOUT_S} seconds") from error
    if run.returncode != 0 or not out.exists():
        first_line = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr[:200])
        raise BuildError(f"{command[0]} failed: {first_line or 'it said nothing and wrote no file'}")


def is_whole(path: Path) -> bool:
    """Whether the library is there and is what was compiled."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest().encode() == path.with_suffix(".sha256").read_bytes()
    except OSError:
        return False


@contextmanager
def one_process_at_a_time(path: Path) -> Iterator[None]:
    """Holds a lock that ends with the process that holds it."""
    try:
        import fcntl
    except ImportError as error:
        raise BuildError("this operating system has no file locks that the build knows") from error
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
