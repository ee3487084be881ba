"""Text for language models: the addresses that come with the package, or a file of one's own."""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal, cast, get_args

from mixhead.data.records import RECORDS, documents_of
from mixhead.errors import MixheadError

Split = Literal["train", "calibration", "validation", "test"]
_HELD_OUT: tuple[Split, ...] = ("test", "validation", "calibration")
_BLOCK = 10  # neighbours in time of which one address goes to each held-out part


@dataclass(frozen=True)
class Address:
    """One State of the Union address (public domain).

    Attributes:
        year: the year in which it was given.
        president: who gave it.
        text: its words as one paragraph.
    """

    year: int
    president: str
    text: str


def addresses(split: Split) -> tuple[Address, ...]:
    """The addresses of one part, oldest first; no address stands in two parts and every era stands in each.

    Of each ten neighbours in time one goes to `test`, one to `validation`, one to `calibration` and the rest to
    `train`, chosen by a hash of year and president: the parts never change.

    Raises:
        MixheadError: where there is no such part.
    """
    return _parts()[_checked_split(split)]


def read_text_file(path: str | Path) -> str:
    """Reads a UTF-8 text file (a byte order mark is dropped).

    Raises:
        MixheadError: where the file is missing, a folder, unreadable, empty, binary or not UTF-8.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise MixheadError(f"There is no text file {path}; check the name.") from None
    except IsADirectoryError:
        raise MixheadError(f"{path} is a folder; give a text file.") from None
    except OSError as error:
        raise MixheadError(f"The text file {path} cannot be read ({error.strerror}); check its permissions.") from None
    if b"\x00" in data:
        raise MixheadError(
            f"{path} is a binary file (it holds a NUL byte at {data.index(0):,}); give a plain text file in UTF-8."
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MixheadError(
            f"{path} is not UTF-8 text (byte {error.start:,} cannot be decoded); convert it first, "
            f"for example with `iconv -f latin1 -t utf-8`."
        ) from None
    if not text.strip():
        raise MixheadError(f"{path} is empty; give a file that holds text.")
    return text


def text_source(source: str | Path, split: Split = "train") -> list[str]:
    """The documents behind a name on the command line.

    Args:
        source: "addresses" (the part named by `split`), "addresses:test" (the part named here), or the path of a text
            file, which is one document and is taken whole: evaluate on another file than the one you tune on. A file of
            records (.jsonl, .ndjson, .json, .csv) has a document in the field `text` of each, or in the field that
            "FILE:FIELD" names. A file that is itself called "addresses" is reached as "./addresses".
        split: the part where `source` has a name and says none.

    Raises:
        MixheadError: where there is no such part, or the file is of no use.
    """
    name, colon, part = str(source).partition(":")
    if name in NAMED:
        return NAMED[name](_checked_split(part) if colon else split)
    file, _, field = str(source).rpartition(":")
    if Path(file).suffix.lower() in RECORDS and not Path(source).exists():
        return documents_of(Path(file), read_text_file(file), field)
    if Path(source).suffix.lower() in RECORDS:
        return documents_of(Path(source), read_text_file(source))
    return [read_text_file(source)]


# Texts with a name and parts.
NAMED: dict[str, Callable[[Split], list[str]]] = {
    "addresses": lambda split: [address.text for address in addresses(split)],
}


@cache
def _parts() -> dict[Split, tuple[Address, ...]]:
    """Every part, read and parted once per process."""
    packed = (files("mixhead.data") / "addresses.jsonl.xz").read_bytes()
    everything = [Address(**json.loads(line)) for line in lzma.decompress(packed).splitlines()]
    parts: dict[Split, list[Address]] = {split: [] for split in get_args(Split)}
    for start in range(0, len(everything), _BLOCK):
        block = everything[start : start + _BLOCK]
        held_out = dict(zip(sorted(block, key=_lot), _HELD_OUT, strict=False))
        for address in block:
            parts[held_out.get(address, "train")].append(address)
    return {split: tuple(members) for split, members in parts.items()}


def _lot(address: Address) -> str:
    """A fixed lot for the draw of an address: independent of its words and of Python's hash seed."""
    return hashlib.sha256(f"{address.year} {address.president}".encode()).hexdigest()


def _checked_split(split: str) -> Split:
    if split not in get_args(Split):
        raise MixheadError(f"The text has no part {split!r}; choose one of {', '.join(get_args(Split))}.")
    return cast(Split, split)
