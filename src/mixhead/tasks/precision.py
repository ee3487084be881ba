"""Which dtype forward passes run in."""

from __future__ import annotations

import torch

from mixhead.errors import MixheadError
from mixhead.ops.cpu import best_level

DTYPES = ("auto", "float32", "bfloat16")
BF16_LEVELS = ("amx", "avx512_bf16")


def autocast_dtype(name: str = "auto") -> torch.dtype | None:
    """The dtype for autocast behind a name; None computes in the model's own.

    "auto" takes bfloat16 where the machine multiplies it faster than float32: on a GPU, and on a CPU with instructions
    for it.

    Raises:
        MixheadError: where the name is unknown.
    """
    if name not in DTYPES:
        raise MixheadError(f"dtype {name} is unknown: choose one of {', '.join(DTYPES)}.")
    if name == "float32":
        return None
    fast = torch.cuda.is_available() or best_level() in BF16_LEVELS
    return torch.bfloat16 if name == "bfloat16" or fast else None
