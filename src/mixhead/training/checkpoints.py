"""The checkpoints of a run: which are there, and their weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mixhead.errors import MixheadError

PREFIX = "checkpoint-"


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in run.glob(f"{PREFIX}*") if p.is_dir() and re.fullmatch(r"\d+", p.name.removeprefix(PREFIX))]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps done when the checkpoint was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Loads the safetensors of a checkpoint into the model that it was made from.

    Raises:
        MixheadError: where the files are damaged or belong to another model.
    """
    index = checkpoint / "model.safetensors.index.json"
    try:
        names = {"model.safetensors"}
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        state = {key: tensor for name in sorted(names) for key, tensor in load_file(checkpoint / name).items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise damaged(checkpoint, error) from error
    tensors: dict[str, Any] = model.state_dict(keep_vars=True)
    loaded = {tensors[key].data_ptr() for key in state if key in tensors}
    lost = [key for key in missing if tensors[key].data_ptr() not in loaded]  # tied weights are stored once
    if lost or unexpected:
        raise damaged(checkpoint, f"missing {lost[:3]}, unknown {unexpected[:3]}")


def damaged(checkpoint: Path, why: object) -> MixheadError:
    """The error to raise for a checkpoint that cannot be read."""
    return MixheadError(
        f"The checkpoint {checkpoint} is damaged or belongs to another model ({why}); delete this folder to continue "
        "from the one before it."
    )
