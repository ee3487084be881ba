"""Compiles the kernels on first use and keeps them in the user's cache.

A family of operators is a library of its own, so that the first attention waits for attention alone. A build is known
by the version of PyTorch, the instruction set, the C library, the compiler's flags and the sources: a cache that
several machines share holds one build for each kind. One process compiles while the others wait; a build appears in the
cache whole or not at all, and one whose checksum does not fit, or that does not load, is made anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from mixhead.files import scratch_folder

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "source"
# The libraries, and what each is compiled from.
LIBRARIES = {
    "attention": ("attention_forward.cpp", "attention_backward.cpp", "routing.cpp"),
    "projections": ("projections.cpp",),
    "aggregated": ("aggregated.cpp",),
    "convolutional_glu": ("convolutional_glu.cpp",),
}
# The stable ABI of the oldest PyTorch that is supported: one library serves that version and every later one.
TARGET = "-DTORCH_TARGET_VERSION=0x020d000000000000"
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-w", TARGET)
TIMEOUT_S = 600

# Instruction sets, the best first, with the flags that let the compiler use them.
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma")
FLAGS_OF_LEVEL = {
    "amx": (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512_bf16": (*AVX512, "-mavx512bf16"),
    "avx512": AVX512,
    "avx2": ("-mavx2", "-mfma"),
    "neon": (),
    "plain": (),
}


class BuildError(Exception):
    """A library cannot be had; the message is a sentence."""


def cache_directory() -> Path:
    """MIXHEAD_CACHE, or mixhead in XDG_CACHE_HOME, or in ~/.cache."""
    if own := os.environ.get("MIXHEAD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixhead"


def library(name: str, level: str) -> Path:
    """Path of a compiled library for an instruction set, whole and checked; compiles it where there is none.

    Raises:
        BuildError: without a compiler, where compiling fails or the cache cannot be written.
    """
    command = compile_command(level)
    sources = [file for file in sorted(SOURCES.iterdir()) if file.suffix == ".h" or file.name in LIBRARIES[name]]
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sources]
    known_by = [torch.__version__, level, platform.machine(), *platform.libc_ver(), *command[1:], *contents]
    key = hashlib.sha256("\n".join(known_by).encode()).hexdigest()[:16]
    path = cache_directory() / "kernels" / f"{name}-torch{torch.__version__}-{level}-{key}.so"
    if is_whole(path):
        return path
    if shutil.which(command[0]) is None:
        raise BuildError("no C++ compiler was found (c++, g++ or clang++, or the one that CXX names)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with one_process_at_a_time(path.with_suffix(".lock")):
            if not is_whole(path):
                words = name.replace("_", " ")
                logger.warning("Compiling the kernel of %s for %s, once, in some seconds: %s", words, level, path)
                compile_into(path, command, LIBRARIES[name])
    except OSError as error:
        raise BuildError(f"it cannot be kept in {path.parent} ({error}); MIXHEAD_CACHE names another folder") from error
    return path


def compile_command(level: str) -> list[str]:
    """The compiler and its arguments, without files. CXX may hold arguments too.

    Raises:
        BuildError: where CXX cannot be read as a command.
    """
    try:
        own = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX cannot be read as a command ({error}): {os.environ['CXX']}") from error
    compiler = own or [next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "c++")]
    return [*compiler, *FLAGS, *FLAGS_OF_LEVEL[level], f"-I{Path(torch.__file__).parent / 'include'}"]


def compile_into(path: Path, command: list[str], sources: tuple[str, ...]) -> None:
    """Compiles beside `path`, all sources at once, and moves the result there in one step, its checksum first."""
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
    with scratch_folder(path) as folder, ThreadPoolExecutor() as pool:
        objects = {SOURCES / name: folder / f"{Path(name).stem}.o" for name in sources}
        list(pool.map(lambda source: compile_file([*command, "-c", str(source)], objects[source]), objects))
        made = folder / "kernel.so"
        compile_file([*command, "-shared", *map(str, objects.values()), *libraries], made)
        checksum = folder / "checksum"
        checksum.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        checksum.replace(path.with_suffix(".sha256"))
        made.replace(path)


def compile_file(command: list[str], out: Path) -> None:
    """Runs the compiler; a `BuildError` says what it said."""
    try:
        run = subprocess.run(
            [*command, "-o", str(out)], capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took longer than {TIMEOUT_S} seconds") from error
    except OSError as error:
        raise BuildError(f"{command[0]} could not be run ({error})") from error
    if run.returncode != 0 or not out.exists():
        first_line = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr[:200])
        raise BuildError(f"{command[0]} failed: {first_line or 'it said nothing and wrote no file'}")


def is_whole(path: Path) -> bool:
    """Whether the library is there and is what was compiled."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest().encode() == path.with_suffix(".sha256").read_bytes()
    except OSError:
        return False


def forget(path: Path) -> None:
    """Takes a library out of the cache: it is compiled anew when it is next wanted."""
    path.with_suffix(".sha256").unlink(missing_ok=True)


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
