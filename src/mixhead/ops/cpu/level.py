"""The instruction set that the kernels are compiled for: the best of this processor, or the one that a user names."""

from __future__ import annotations

import functools
import os
import platform

import torch

from mixhead.errors import MixheadError
from mixhead.ops.constant import constant_when_compiled

# By kind of processor, the best first.
LEVELS = {
    "x86": ("amx", "avx512_bf16", "avx512", "avx2", "plain"),
    "arm": ("neon", "plain"),
    "other": ("plain",),
}
# What PyTorch is asked about the processor. The operating system lends the matrix units to processes that ask, and may
# refuse.
NEEDS = {
    "amx": ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_init_amx"),
    "avx512_bf16": ("_is_avx512_bf16_supported",),
    "avx512": ("_is_avx512_supported",),
    "avx2": ("_is_avx2_supported",),
}
# What ATEN_CPU_CAPABILITY leaves PyTorch's own kernels holds for ours: the best level that each of them allows.
BEST_BY_CAPABILITY = {"AVX512": "amx", "AVX2": "avx2"}


@constant_when_compiled
def best_level() -> str:
    """The best instruction set of this CPU that PyTorch may use; MIXHEAD_CPU_LEVEL names another one.

    Raises:
        MixheadError: where MIXHEAD_CPU_LEVEL names what there is not, or what this processor does not have.
    """
    return detect_level()


@functools.cache
def detect_level() -> str:
    """What `best_level` returns, found out once per process."""
    levels = LEVELS[kind_of_processor()]
    if wanted := os.environ.get("MIXHEAD_CPU_LEVEL"):
        check_level(wanted)
        return wanted
    if kind_of_processor() == "x86":
        best = BEST_BY_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), "plain")
        levels = levels[levels.index(best) :]
    return next(level for level in levels if processor_has(level))


def check_level(wanted: str) -> None:
    """Refuses an instruction set that this processor does not have, before its first instruction ends the process."""
    every = [level for levels in LEVELS.values() for level in levels]
    if wanted not in every:
        raise MixheadError(f"MIXHEAD_CPU_LEVEL is {wanted!r}, not one of {', '.join(dict.fromkeys(every))}.")
    runs = levels_of_processor()
    if wanted not in runs:
        raise MixheadError(
            f"MIXHEAD_CPU_LEVEL is {wanted!r}, which this processor does not have. It runs {', '.join(runs)}."
        )


def levels_of_processor() -> list[str]:
    """All instruction sets of LEVELS that this processor runs, the best first."""
    return [level for level in LEVELS[kind_of_processor()] if processor_has(level)]


def kind_of_processor() -> str:
    """A key of LEVELS."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return "x86"
    return "arm" if machine in ("aarch64", "arm64") else "other"


def processor_has(level: str) -> bool:
    """Whether the processor, and the operating system with it, run an instruction set of its kind."""
    return all(can(name) for name in NEEDS.get(level, ()))


def can(name: str) -> bool:
    """What PyTorch says about the CPU; False where this version of it does not say."""
    ask = getattr(torch.cpu, name, None)
    return ask is not None and bool(ask())
