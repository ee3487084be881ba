"""What tokens used, as a file: written while a model runs, read without it.

A recording is two files, NAME.safetensors and NAME.json. Padding is left out; a gate takes one byte, 0 where the head
is not selected and else 1 to 255, evenly between the smallest and the largest gate of that call. Layers that saw the
same tokens in the same order share their description:

| Tensor | Shape | Holds |
|---|---|---|
| `gates/LAYER` | uint8 [T, H] | one byte for each gate of each token |
| `range/LAYER` | float32 [K, 2] | smallest and largest gate of each call of the layer |
| `chunks/LAYER` | int32 [K] | which chunk of tokens each call of the layer saw |
| `starts` | int64 [chunks + 1] | where each chunk begins among all described tokens |
| `token/call`, `row`, `sequence`, `position` | int32 [X] | where each described token stood |
| `label/NAME` | int32 or float32 [X] | what the model says of it, -1 or NaN where it says nothing |

Shape legend: B batch, N tokens of a call, H heads, T tokens of a layer, K calls of a layer, X described tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.files import partial_of, scratch_folder, sweep
from mixhead.routing.value import Routing

FORMAT = "mixhead routing 1"
PLACES = ("call", "row", "sequence", "position")
_BLOCK = 1 << 20
_DTYPES = {"uint8": "U8", "int32": "I32", "int64": "I64", "float32": "F32"}


@dataclass(frozen=True)
class Call:
    """The forward call that a routing belongs to.

    Attributes:
        number: counts the calls of a recording.
        first_sequence: number of the sequence in row 0; a call that continues sequences (generation) has theirs.
        offset: position of the first token in its sequence.
        labels: what is known of the tokens: integers or floats, [B], [B, N] or [1, N].
    """

    number: int = 0
    first_sequence: int = 0
    offset: int = 0
    labels: Mapping[str, Tensor] = field(default_factory=dict)


class RecordingWriter:
    """Writes routings as they come. What it keeps in memory does not grow with the number of tokens.

    Args:
        folder: where the parts of the recording grow, in a hidden folder that is deleted with the writer; by default
            that for temporary files.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        place = Path(tempfile.gettempdir() if folder is None else folder) / "routing"
        sweep(place)
        self._folder = partial_of(place)
        try:
            self._folder.mkdir(mode=0o700)
        except OSError as error:
            raise MixheadError(f"Nothing can be recorded in {place.parent}: {error.strerror or error}.") from error
        self._spools: dict[str, _Spool] = {}
        self._chunks: dict[bytes, int] = {}  # of the present call
        self._call, self._num_chunks, self._num_tokens = -1, 0, 0
        self.names: dict[str, dict[int, str]] = {}
        self._competes: dict[str, Tensor] = {}  # by layer: the heads that have ever had a probability
        self.discard = weakref.finalize(self, _discard, self._folder, self._spools)
        self._spool("starts", np.int64, ()).append(np.zeros(1, np.int64))

    def add(self, layer: str, routing: Routing, call: Call) -> None:
        """Appends the routing of one layer in one call."""
        selected_BNH = routing.selected_BNH.detach().cpu()
        mask_BN = _mask(routing).cpu()
        if routing.probs_BNH is not None:
            competes_H = (routing.probs_BNH.detach() > 0).any(0).any(0).cpu()
            self._competes[layer] = competes_H | self._competes.get(layer, competes_H)
        codes_TH, limits = encode(routing.gates_BNH.detach().float().cpu()[mask_BN], selected_BNH[mask_BN])
        known = self._spools.get(f"gates/{layer}")
        if known is not None and known.shape != codes_TH.shape[1:]:
            raise MixheadError(f"{layer} routed among {known.shape[0]} heads before, and now {codes_TH.shape[1]}.")
        self._spool(f"gates/{layer}", np.uint8, codes_TH.shape[1:]).append(codes_TH)
        self._spool(f"range/{layer}", np.float32, (2,)).append(limits[None])
        chunk = np.array([self._chunk(mask_BN, call)], np.int32)
        self._spool(f"chunks/{layer}", np.int32, ()).append(chunk)

    def _chunk(self, mask_BN: Tensor, call: Call) -> int:
        """The number of the chunk that describes these tokens; other layers of the same call have written most."""
        if call.number != self._call:
            self._call, self._chunks = call.number, {}
        columns = {**_places(mask_BN, call), **_labels(mask_BN, call)}
        digest = hashlib.sha256(repr([*columns]).encode())
        for values_X in columns.values():
            digest.update(values_X.tobytes())
        key = digest.digest()
        if key not in self._chunks:
            self._chunks[key] = self._num_chunks
            self._describe(columns, int(mask_BN.sum()))
        return self._chunks[key]

    def _describe(self, columns: dict[str, NDArray[Any]], tokens: int) -> None:
        for name, values_X in columns.items():
            spool = self._spool(name, values_X.dtype.type, ())
            spool.fill(self._num_tokens)
            spool.append(values_X.astype(spool.dtype))
        self._num_chunks += 1
        self._num_tokens += tokens
        self._spool("starts", np.int64, ()).append(np.array([self._num_tokens], np.int64))

    def _spool(self, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> _Spool:
        if name not in self._spools:
            self._spools[name] = _Spool(self._folder / str(len(self._spools)), np.dtype(dtype), shape)
        return self._spools[name]

    def save(self, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
        """Writes all that was added so far as PATH.safetensors and PATH.json, whole or not at all.

        Args:
            path: NAME of the recording, with or without a suffix; its folder must exist.
            about: what to remember of the model, anything that JSON can hold.
        """
        path = checked_path(path)
        if not self.discard.alive:
            raise MixheadError("This recording is complete and lies in its files: copy those.")
        for name, spool in self._spools.items():
            if name.startswith("label/"):
                spool.fill(self._num_tokens)
        description = {
            "format": FORMAT,
            "layers": [name.removeprefix("gates/") for name in self._spools if name.startswith("gates/")],
            "shared": {layer: (~competes_H).nonzero()[:, 0].tolist() for layer, competes_H in self._competes.items()},
            "names": {label: {str(value): text for value, text in of.items()} for label, of in self.names.items()},
            "about": dict(about or {}),
        }
        # In ASCII: a token's name may be a byte that is no character, which UTF-8 cannot hold.
        text = json.dumps(description, indent=1) + "\n"
        try:
            with scratch_folder(path) as folder:
                for spool in self._spools.values():
                    spool.file.flush()
                tensors, names = folder / "tensors", folder / "names"
                _join(self._spools, tensors)
                names.write_text(text, encoding="ascii")
                tensors.replace(_with_suffix(path, ".safetensors"))
                names.replace(_with_suffix(path, ".json"))
        except OSError as error:
            raise MixheadError(f"The recording {path} cannot be written: {error.strerror or error}.") from error


def recording_name(path: str | Path) -> Path:
    """NAME of the recording NAME, NAME.safetensors or NAME.json."""
    return Path(str(path).removesuffix(".safetensors").removesuffix(".json"))


def recording_exists(path: str | Path) -> bool:
    """Whether there is a recording of that name."""
    return _with_suffix(recording_name(path), ".safetensors").is_file()


def checked_path(path: str | Path) -> Path:
    """NAME of a recording that can be written, see `recording_name`.

    Raises:
        MixheadError: where its folder does not exist, or is read-only.
    """
    path = recording_name(path)
    if not path.parent.is_dir():
        raise MixheadError(f"The folder {path.parent} of the recording does not exist: make it first.")
    if not os.access(path.parent, os.W_OK):
        raise MixheadError(f"The folder {path.parent} of the recording cannot be written to: give another one.")
    return path


def _discard(folder: Path, spools: Mapping[str, _Spool]) -> None:
    for spool in spools.values():
        spool.file.close()
    shutil.rmtree(folder, ignore_errors=True)


class _Spool:
    """One tensor that grows along its first axis, in a file."""

    def __init__(self, file: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.dtype, self.shape, self.rows = dtype, shape, 0
        self.file = file.open("wb")

    def append(self, values: NDArray[Any]) -> None:
        try:
            self.file.write(np.ascontiguousarray(values, self.dtype).tobytes())
        except OSError as error:
            raise MixheadError(f"What is recorded cannot be written to {self.file.name}: {error.strerror}.") from error
        self.rows += len(values)

    def fill(self, rows: int) -> None:
        """Says that nothing is known, up to that many rows."""
        nothing = np.nan if self.dtype.kind == "f" else -1
        while self.rows < rows:
            self.append(np.full(min(rows - self.rows, _BLOCK), nothing, self.dtype))


def encode(gates_TH: Tensor, selected_TH: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """One byte for each gate, and the smallest and the largest gate, float32 [2]."""
    chosen = gates_TH[selected_TH]
    low, high = (float(chosen.min()), float(chosen.max())) if chosen.numel() else (0.0, 0.0)
    steps_TH = (gates_TH - low) * (254.0 / (high - low) if high > low else 0.0)
    codes_TH = torch.where(selected_TH, steps_TH.clamp(0, 254).round() + 1, 0).to(torch.uint8)
    return codes_TH.numpy(), np.array([low, high], np.float32)


def decode(codes_TH: NDArray[np.uint8], limits_T2: NDArray[np.float32]) -> NDArray[np.float32]:
    """The gates behind `encode`, right to half a step of the range of their call; 0 where a head is not selected."""
    low_T1, high_T1 = limits_T2[:, :1], limits_T2[:, 1:]
    gates_TH = low_T1 + (codes_TH.astype(np.float32) - 1) / 254 * (high_T1 - low_T1)
    return np.where(codes_TH > 0, gates_TH, np.float32(0)).astype(np.float32)


def _mask(routing: Routing) -> Tensor:
    shape = routing.selected_BNH.shape[:2]
    mask_BN = routing.token_mask_BN
    return torch.ones(shape, dtype=torch.bool) if mask_BN is None else mask_BN.expand(shape)


def _places(mask_BN: Tensor, call: Call) -> dict[str, NDArray[Any]]:
    """Where the real tokens stood. Positions count real tokens only, so that padding on the left moves none."""
    row_BN = torch.arange(mask_BN.shape[0])[:, None].expand(mask_BN.shape)
    position_BN = mask_BN.cumsum(1) - 1 + call.offset
    places = {
        "token/call": torch.full_like(row_BN, call.number),
        "token/row": row_BN,
        "token/sequence": row_BN + call.first_sequence,
        "token/position": position_BN,
    }
    return {name: values_BN[mask_BN].numpy().astype(np.int32) for name, values_BN in places.items()}


def _labels(mask_BN: Tensor, call: Call) -> dict[str, NDArray[Any]]:
    """The labels of the real tokens; one of another shape is about the tokens of other layers."""
    labels = {}
    for name, values in call.labels.items():
        values_BX = values.detach().cpu().reshape(-1, 1) if values.dim() < 2 else values.detach().cpu()
        if all(have in (1, want) for have, want in zip(values_BX.shape, mask_BN.shape, strict=True)):
            dtype = np.float32 if values_BX.is_floating_point() else np.int32
            labels[f"label/{name}"] = values_BX.expand(mask_BN.shape)[mask_BN].numpy().astype(dtype)
    return labels


def _join(spools: Mapping[str, _Spool], out: Path) -> None:
    """Writes the spools as one safetensors file, without holding any of them in memory."""
    # By falling size of the items, so that each tensor is aligned.
    order = sorted(spools, key=lambda name: (-spools[name].dtype.itemsize, name))
    header, at = {}, 0
    for name in order:
        spool = spools[name]
        size = Path(spool.file.name).stat().st_size
        shape = [spool.rows, *spool.shape]
        header[name] = {"dtype": _DTYPES[spool.dtype.name], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with out.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            with Path(spools[name].file.name).open("rb") as spool_file:
                shutil.copyfileobj(spool_file, file, _BLOCK)
        file.flush()
        os.fsync(file.fileno())


def _with_suffix(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


@dataclass(frozen=True)
class Tokens:
    """The tokens that a layer routed, in the order of its rows: NumPy arrays [T].

    Attributes:
        call: number of the forward call.
        row: row in the batch of that call.
        sequence: number of the sequence; generation continues sequences over many calls.
        position: place in the sequence, counting from 0.
        labels: what the model said of the tokens (`token`, `time_step`, `class`, …), -1 or NaN where it said nothing.
    """

    call: NDArray[np.int32]
    row: NDArray[np.int32]
    sequence: NDArray[np.int32]
    position: NDArray[np.int32]
    labels: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.call)


class Recording:
    """A recording that was saved; opening it reads its headers only, and needs no model.

    Args:
        path: NAME, NAME.safetensors or NAME.json.

    Attributes:
        layers: names of the layers that routed, in the order in which they ran first.
        shared: by layer, the heads that never compete, since every token uses them; where the router did not say which,
            the layer is missing.
        names: for labels whose numbers stand for something: the text of each number.
        about: what was remembered of the model.

    Raises:
        MixheadError: where there is no recording, or it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = recording_name(path)
        file = _with_suffix(self.path, ".safetensors")
        try:
            description = json.loads(_with_suffix(self.path, ".json").read_text("utf-8"))
            if description["format"] != FORMAT:
                raise ValueError(f"its format is {description['format']!r}, and this is {FORMAT!r}")
            self.layers: tuple[str, ...] = tuple(str(name) for name in description["layers"])
            self.shared = {str(name): [int(head) for head in of] for name, of in description["shared"].items()}
            self.names = {
                str(label): {int(value): str(text) for value, text in of.items()}
                for label, of in description["names"].items()
            }
            self.about: dict[str, Any] = dict(description["about"])
            self._file = safe_open(file, framework="np")
            self._keys = {*self._file.keys()}
            self._starts: NDArray[np.int64] = self._file.get_tensor("starts")
            for layer in self.layers:
                if int(self._sizes_K(layer).sum()) != self.num_tokens(layer):
                    raise ValueError(f"the parts of {layer} do not fit together")
        except FileNotFoundError:
            raise MixheadError(f"There is no recording {self.path} (.safetensors and .json).") from None
        except (
            OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError,
        ) as error:  # fmt: skip
            raise MixheadError(f"The recording {self.path} is damaged or none of mixhead's ({error}).") from error

    def num_heads(self, layer: str) -> int:
        """How many heads the layer has."""
        return int(self._file.get_slice(f"gates/{layer}").get_shape()[1])

    def num_tokens(self, layer: str) -> int:
        """How many tokens the layer routed."""
        return int(self._file.get_slice(f"gates/{layer}").get_shape()[0])

    def codes(self, layer: str) -> NDArray[np.uint8]:
        """The gates as they are stored, uint8 [T, H]; see `decode`."""
        codes_TH: NDArray[np.uint8] = self._file.get_tensor(f"gates/{layer}")
        return codes_TH

    def selected(self, layer: str) -> NDArray[np.bool_]:
        """bool [T, H], True where the token used the head."""
        return self.codes(layer) > 0

    def gates(self, layer: str) -> NDArray[np.float32]:
        """float32 [T, H], exact to half of 1/254 of the range of gates in each call."""
        limits_K2 = self._file.get_tensor(f"range/{layer}")
        return decode(self.codes(layer), np.repeat(limits_K2, self._sizes_K(layer), axis=0))

    def _sizes_K(self, layer: str) -> NDArray[np.int64]:
        """Tokens of each call of the layer."""
        sizes_K: NDArray[np.int64] = np.diff(self._starts)[self._file.get_tensor(f"chunks/{layer}")]
        return sizes_K

    def tokens(self, layer: str) -> Tokens:
        """The tokens that the layer routed."""
        chunks_K = self._file.get_tensor(f"chunks/{layer}")
        # Most layers saw all chunks in order; the others gather theirs.
        index = np.concatenate([np.arange(self._starts[k], self._starts[k + 1]) for k in chunks_K] or [np.arange(0)])
        labels = {key.removeprefix("label/"): key for key in sorted(self._keys) if key.startswith("label/")}
        call, row, sequence, position = (self._file.get_tensor(f"token/{place}")[index] for place in PLACES)
        known = {name: self._file.get_tensor(key)[index] for name, key in labels.items()}
        return Tokens(call, row, sequence, position, known)

    def same_tokens(self, layer: str) -> list[str]:
        """The layers that routed exactly the tokens of this one, itself included, in their order."""
        chunks_K = self._file.get_tensor(f"chunks/{layer}")
        return [name for name in self.layers if np.array_equal(self._file.get_tensor(f"chunks/{name}"), chunks_K)]
