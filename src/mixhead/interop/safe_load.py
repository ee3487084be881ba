"""Reading files of weights from strangers: nothing that a file says is ever executed.

A `.pth`, `.pt` or `.bin` file is a pickle, a small program. PyTorch's restricted unpickler runs the part of it that
builds tensors and plain containers; a class outside its list and ours stops the load. Files stay on disk and are mapped
into memory, so that opening a large one costs nothing until a tensor of it is read.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mixhead.errors import MixheadError, first_line

# All that the published MoH files need beyond tensors and plain containers: the training scripts of MoH-ViT and MoH-DiT
# saved their command line (`args`) beside the weights.
PUBLISHED_CLASSES: tuple[type, ...] = (argparse.Namespace,)

ZIP, PICKLE, GIT_LFS = b"PK", b"\x80", b"version https://git-lfs"
# torch.compile, under which the official scripts train, and DistributedDataParallel put these before every name.
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
CHUNK_BYTES = 1 << 22


def load_pickle_weights(
    path: str | os.PathLike[str],
    *,
    entry: str | None = None,
    allow: Sequence[type] = PUBLISHED_CLASSES,
    verify: bool = True,
) -> dict[str, Tensor]:
    """The named tensors of a `.pth`, `.pt`, `.bin` or `.safetensors` file, on the CPU, without executing anything.

    Both formats of `torch.save` are read (archives are mapped, the old format is read into memory), and safetensors,
    whatever the file is called.

    Args:
        path: the file.
        entry: which dictionary inside a training checkpoint holds the weights: "model" in the published MoH-ViT files,
            "ema" or "model" in those of MoH-DiT. None: the file is the dictionary.
        allow: classes that the file may name beside what PyTorch considers safe.
        verify: whether to compare an archive's check sums first, which reads the file once (about a second per GB).

    Returns:
        Tensors by name. Those of a mapped file share its memory: they may be changed, the file is not.

    Raises:
        MixheadError: where the file is missing, empty, truncated or corrupt, names a class that is not allowed, or
            holds something else than named tensors.
    """
    file = Path(path)
    return named_tensors(file, load_pickle(file, allow=allow, verify=verify), entry)


def load_pickle(path: str | os.PathLike[str], *, allow: Sequence[type] = PUBLISHED_CLASSES, verify: bool = True) -> Any:
    """All that a file holds, read as `load_pickle_weights` reads it: tensors, plain containers and allowed classes."""
    file = Path(path)
    start = read_start(file)
    if start.startswith(ZIP):
        if verify:
            check_archive(file)
        return unpickle(file, allow, mmap=True)
    if start.startswith(PICKLE):
        return unpickle(file, allow, mmap=False)
    if not is_safetensors(start):
        raise MixheadError(f"{file} is no file of weights: it is neither a torch.save file nor safetensors.")
    try:
        return load_file(file)
    except Exception as error:
        raise MixheadError(f"{file} is truncated or corrupt: download it again ({first_line(error)}).") from error


def read_start(file: Path) -> bytes:
    """The first bytes of a file that can be read and is not empty."""
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
    except FileNotFoundError:
        raise MixheadError(f"There is no file {file}.") from None
    except IsADirectoryError:
        raise MixheadError(f"{file} is a folder, but a file of weights is wanted.") from None
    except OSError as error:
        raise MixheadError(f"{file} cannot be read: {error.strerror}.") from error
    if not start:
        raise MixheadError(f"{file} is empty: download it again.")
    if start.startswith(GIT_LFS):
        raise MixheadError(f"{file} is a Git LFS pointer and not the file itself: fetch that with `git lfs pull`.")
    return start


def is_safetensors(start: bytes) -> bool:
    """Whether a file starts as safetensors do: the header's length, 8 bytes, and the header, JSON."""
    return start[8:9] == b"{"


def check_archive(file: Path) -> None:
    """Compares the check sums of a torch.save archive: a flipped bit would otherwise become a wrong weight."""
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:
                    raise MixheadError(f"{file} is a compressed archive and not a file of torch.save.")
                if member.CRC == 0:
                    continue  # saved without check sums (torch.serialization.set_crc32_options), or empty
                with archive.open(member) as stream:
                    while stream.read(CHUNK_BYTES):
                        pass
    except MixheadError:
        raise
    except Exception as error:  # zipfile raises many types on corrupt files
        raise MixheadError(f"{file} is truncated or corrupt: download it again ({first_line(error)}).") from error


def unpickle(file: Path, allow: Sequence[type], mmap: bool) -> Any:
    """What `torch.load` makes of the file with its restricted unpickler."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(allow)):
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols, before an error that says more
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            allowed = ", ".join(f"{c.__module__}.{c.__qualname__}" for c in allow) or "none"
            raise MixheadError(
                f"{file} was refused, and nothing in it was executed: it asks for {refused[1]}, which no file of "
                f"weights needs (allowed beside tensors and plain containers: {allowed}). If that is a harmless class "
                "and you trust where the file comes from, name the class in `allow`."
            ) from error
        raise MixheadError(
            f"{file} was refused, and nothing in it was executed: it is corrupt, or a pickle of something else than "
            "weights saved by torch.save."
        ) from error
    except Exception as error:  # the unpickler raises many types on corrupt files
        raise MixheadError(
            f"{file} is truncated or corrupt, or was not saved by torch.save: download it again ({first_line(error)})."
        ) from error


def named_tensors(file: Path, content: Any, entry: str | None) -> dict[str, Tensor]:
    """The content, or one entry of it, as tensors by name."""
    where = str(file)
    if entry is not None:
        if not isinstance(content, Mapping) or entry not in content:
            found = ", ".join(map(repr, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
            raise MixheadError(f"{file} has no entry {entry!r}, only: {found or 'nothing'}.")
        content, where = content[entry], f"The entry {entry!r} of {file}"
    if not isinstance(content, Mapping):
        raise MixheadError(f"{where} holds a {type(content).__name__}, but tensors by name are wanted.")
    if not content:
        raise MixheadError(f"{where} holds nothing, but tensors by name are wanted.")
    inner = [name for name, value in content.items() if isinstance(value, Mapping)]
    if inner:
        raise MixheadError(
            f"{where} is no state dict but holds {', '.join(map(repr, inner[:8]))}: choose one with `entry`."
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise MixheadError(f"{where} holds a {type(value).__name__} at {name!r}, but tensors by name are wanted.")
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise MixheadError(f"{where}: {name} is sparse, quantised or without data, but a plain tensor is wanted.")
    return {name: value.detach() for name, value in content.items()}
