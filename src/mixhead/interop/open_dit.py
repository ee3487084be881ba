"""A DiT from whatever holds one: a checkpoint of the official training, or a folder of diffusers or of this library."""

from __future__ import annotations

import os
from pathlib import Path

from mixhead.errors import MixheadError
from mixhead.interop.diffusers_dit import class_name, is_diffusers_dit, load_diffusers_dit, transformer_folder
from mixhead.interop.dit import is_dit_file, load_moh_dit
from mixhead.models.moh_dit import MoHDiT

OUR_CLASS = "MoHDiTTransformer2DModel"


def holds_dit(path: str | os.PathLike[str]) -> bool:
    """Whether a `.pt` or `.pth` file, or a folder of a model or pipeline, holds a DiT; nothing large is read."""
    source = Path(path)
    if source.suffix in (".pt", ".pth"):
        return is_dit_file(source)
    return is_diffusers_dit(source) or class_name(transformer_folder(source)) == OUR_CLASS


def open_dit(path: str | os.PathLike[str], name: str | None = None) -> MoHDiT:
    """The network, in evaluation mode.

    Args:
        path: a `.pt` or `.pth` file, or a folder of a model or of a pipeline.
        name: of the published configuration, for a file whose weights fit several or none.

    Raises:
        MixheadError: where there is no DiT, or one that cannot be read.
    """
    source = Path(path)
    if not holds_dit(source):
        raise MixheadError(f"{source} holds no diffusion transformer: name the folder or the checkpoint of a DiT.")
    if source.is_file():
        return load_moh_dit(source, name)
    if is_diffusers_dit(source):
        return load_diffusers_dit(source)
    from mixhead.models.moh_dit import load_dit

    return load_dit(source)
