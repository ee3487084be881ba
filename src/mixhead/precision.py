"""Which dtype forward passes run in: bfloat16 where this machine multiplies it faster than float32, by measurement."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

from mixhead.errors import MixheadError

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16")
# Of a setting: whether to compute in bfloat16, or to find out whether that is faster here.
Bf16 = bool | Literal["auto"]

SIZE = 192  # of the measured products: some milliseconds, emulated too
TURNS = 3
WORTHWHILE = 1.1  # what products have to gain: autocast also converts weights and activations


def autocast_dtype(name: str = "auto") -> torch.dtype | None:
    """The dtype for autocast behind a name; None computes in the model's own.

    "auto" takes bfloat16 where the machine multiplies it faster than float32, and logs which it took and why; where it
    is slower, asking for it by name warns with the factor. Both once per process.

    Raises:
        MixheadError: where the name is unknown.
    """
    if name not in DTYPES:
        raise MixheadError(f"dtype {name} is unknown: choose one of {', '.join(DTYPES)}.")
    taken = takes_bfloat16("auto" if name == "auto" else name == "bfloat16")
    return torch.bfloat16 if taken else None


def takes_bfloat16(asked: Bf16) -> bool:
    """Whether to compute in bfloat16 where that was asked for; see `autocast_dtype`."""
    if asked == "auto":
        return faster_in_bfloat16()
    if asked:
        warn_if_slower()
    return bool(asked)


@functools.cache
def faster_in_bfloat16() -> bool:
    """Whether this machine is: a GPU that has bfloat16, or a processor on which it was measured."""
    if torch.cuda.is_available():
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
        reason = f"the GPU {'has' if faster else 'has no'} instructions for bfloat16"
    else:
        factor = bfloat16_speed()
        faster = factor >= WORTHWHILE
        reason = f"products of matrices take {compared(factor)} in bfloat16 as in float32 here"
    logger.info("Computing in %s: %s.", "bfloat16" if faster else "float32", reason)
    return faster


@functools.cache
def warn_if_slower() -> None:
    """Warns where bfloat16 is emulated."""
    if torch.cuda.is_available():
        slower = not torch.cuda.is_bf16_supported(including_emulation=False)
        reason = "the GPU has no instructions for it"
    else:
        factor = bfloat16_speed()
        slower = factor < 1.0
        reason = f"products of matrices take {compared(factor)} in it as in float32"
    if slower:
        logger.warning("bfloat16 was asked for, and this machine emulates it: %s.", reason)


def compared(factor: float) -> str:
    """A speed as a comparison of times: "0.3 times as long", "25 times as long"."""
    times = 1 / factor
    return f"{times:.0f} times as long" if times >= 10 else f"{times:.2g} times as long"


@functools.cache
def bfloat16_speed() -> float:
    """How many times as fast as in float32 the processor multiplies in bfloat16; measured once per process.

    What is measured is what a linear layer multiplies, forward and backward: the emulation of the backward products is
    slower by another factor of ten.
    """
    x_NC = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return shortest(products, x_NC) / shortest(products, x_NC.bfloat16())


def products(x_NC: torch.Tensor) -> None:
    """Output, gradient of the input and gradient of the weight of a linear layer whose tensors are all the same."""
    F.linear(x_NC, x_NC)
    x_NC @ x_NC
    x_NC.T @ x_NC


def shortest(run: Callable[[torch.Tensor], None], x_NC: torch.Tensor) -> float:
    """Seconds of the fastest of a few turns."""
    seconds = []
    with torch.no_grad():
        for _ in range(TURNS):
            start = time.perf_counter()
            run(x_NC)
            seconds.append(time.perf_counter() - start)
    return min(seconds)
