"""Indexes of weights that lie in several files: `*.index.json`, as transformers and diffusers write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mixhead.errors import MixheadError, listed
from mixhead.files import read_json


def read_index(index: Path) -> dict[str, str]:
    """The file, in the folder of the index, that holds each weight.

    Raises:
        MixheadError: where the index is malformed, or names anything outside its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise MixheadError(f"{index} has no weight_map, so it does not say which file holds which weight.")
    for name, file in weight_map.items():
        # Only the name is judged, not where it leads: in the cache of the hub every file is a link.
        if not isinstance(file, str) or file in ("", ".", "..") or any(sign in file for sign in "/\\:\0"):
            raise MixheadError(
                f"{index} looks for {name} in {file!r}, which is no plain name of a file: nothing outside of "
                "the folder is read."
            )
    return dict(weight_map)


def check_indexes(folder: Path) -> None:
    """Every index in a folder of a model is whole, names files of its own folder alone, and none that is missing.

    Raises:
        MixheadError: where that is not so; asked before a library follows an index wherever it leads.
    """
    for index in sorted(folder.glob("*.index.json")):
        absent = sorted({file for file in read_index(index).values() if not (folder / file).is_file()})
        if absent:
            raise MixheadError(f"{folder} is incomplete: {index.name} names {listed(absent)}, which is not there.")
