"""The checkpoints of a run: which are there, whether they are whole, and their weights.

What is written last is `SHA256SUMS`, the check sums of all files (`sha256sum -c` reads it too). They are compared
before anything is loaded: a bit that flipped on the disk would otherwise become a wrong weight.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mixhead.errors import MixheadError
from mixhead.files import read_json
from mixhead.shards import read_index

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
SUMS = "SHA256SUMS"
NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
HOLDS_STATE = (".json", ".pt", ".pth", ".safetensors")


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in run.glob(f"{PREFIX}*") if p.is_dir() and re.fullmatch(r"\d+", p.name.removeprefix(PREFIX))]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps done when the checkpoint was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def write_sums(checkpoint: Path) -> None:
    """Writes the list of all files of a checkpoint with their check sums, the last of its files."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    lines = [f"{sha256(file)}  {file.relative_to(checkpoint).as_posix()}\n" for file in files]
    (checkpoint / SUMS).write_text("".join(lines), encoding="utf-8")


def check(checkpoint: Path) -> None:
    """Refuses a checkpoint that is not whole.

    Raises:
        MixheadError: which names the file, and the checkpoint before it that is whole.
    """
    fault = fault_of(checkpoint)
    if fault is not None:
        raise damaged(checkpoint, fault)
    if not (checkpoint / SUMS).is_file():
        logger.info("%s is of an earlier version, which wrote no check sums: it is taken as it is.", checkpoint)


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None where it is whole."""
    try:
        listed = read_sums(checkpoint / SUMS) if (checkpoint / SUMS).is_file() else {}
        for name in (*NEEDED, *listed):
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
        for name, expected in listed.items():
            if sha256(checkpoint / name) != expected:
                return f"{name} is not what was written there: its check sum is another"
        held = {file.name for file in checkpoint.iterdir() if file.suffix in HOLDS_STATE}
        if listed and held - listed.keys():
            return f"{min(held - listed.keys())} is not in the list {SUMS}"
        step = read_json(checkpoint / "trainer_state.json").get("global_step")
    except (OSError, MixheadError) as error:
        return str(error)
    return None if step == step_of(checkpoint) else f"trainer_state.json is that of step {step}"


def read_sums(file: Path) -> dict[str, str]:
    """The check sum of each file that the list names, by its path in the checkpoint.

    Raises:
        MixheadError: where it is no such list.
    """
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    found = [re.fullmatch(r"([0-9a-f]{64})  ([^/.\0][^\0]*)", line) for line in lines]
    names = {match[2]: match[1] for match in found if match and ".." not in Path(match[2]).parts}
    if len(names) < len(lines) or not text.endswith("\n"):
        raise MixheadError(f"{file.name} is no list of check sums")
    return names


def sha256(file: Path) -> str:
    """The check sum of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Loads the safetensors of a checkpoint into the model that it was made from.

    Raises:
        MixheadError: where the files are damaged or belong to another model.
    """
    state = read_weights(checkpoint)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise damaged(checkpoint, error) from error
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    loaded = {tensors[key].data_ptr() for key in state if key in tensors}
    lost = [key for key in missing if tensors[key].data_ptr() not in loaded]  # tied weights are stored once
    if lost or unexpected:
        raise damaged(checkpoint, f"missing {lost[:3]}, unknown {unexpected[:3]}")


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint, in one file or several.

    Raises:
        MixheadError: where a file is missing or damaged.
    """
    index = checkpoint / "model.safetensors.index.json"
    try:
        names = {*read_index(index).values()} if index.is_file() else {"model.safetensors"}
        return {key: tensor for name in sorted(names) for key, tensor in load_file(checkpoint / name).items()}
    except (OSError, SafetensorError, MixheadError) as error:
        raise damaged(checkpoint, error) from error


def damaged(checkpoint: Path, why: object) -> MixheadError:
    """The error to raise for a checkpoint that cannot be read; it offers the one before."""
    earlier = [c for c in checkpoints(checkpoint.parent) if step_of(c) < step_of(checkpoint)]
    whole = next((c for c in reversed(earlier) if fault_of(c) is None), None)
    way = (
        f"{whole.name} before it is whole: delete the damaged folder to continue from there"
        if whole is not None
        else "no checkpoint before it is whole: begin the run again in another folder"
    )
    return MixheadError(
        f"The checkpoint {checkpoint} is damaged or belongs to another model ({str(why).rstrip('.')}); {way}."
    )
