"""Files and folders that are either complete or absent.

Everything is written under a hidden name ending in `.partial` and renamed when it is complete; what a killed process
leaves under such a name is deleted by the next run.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_PARTIAL = ".partial"

# What the writers raise when a disk is full: the operating system, safetensors and torch.save.
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


def remove_partial(run: Path) -> None:
    """Deletes what a killed process left half-written or half-deleted."""
    for path in run.glob(f".*{_PARTIAL}"):
        remove(path)


def remove(path: Path) -> None:
    """Deletes a file or folder so that it is never seen half-deleted under its own name."""
    if not path.name.endswith(_PARTIAL):
        path = path.rename(path.with_name(f".{path.name}-{_token(path.parent)}{_PARTIAL}"))
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a folder under a temporary name, then puts it in place of whatever bore the name before."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}-{_token(folder.parent)}{_PARTIAL}")
    try:
        partial.mkdir()
        write(partial)
        if folder.exists():
            remove(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a small file under a temporary name, then renames it."""
    write_bytes(path, text.encode())


def changes_since_begun(manifest: Path, asked: Mapping[str, Any]) -> list[str]:
    """Writes what was asked for into a folder, or says what differs from what was asked for there before.

    Args:
        manifest: the JSON file that holds it.
        asked: by name, anything that JSON can hold.

    Returns:
        Names of what differs.
    """
    asked = json.loads(json.dumps(asked))
    if not manifest.is_file():
        manifest.parent.mkdir(parents=True, exist_ok=True)
        write_text(manifest, json.dumps(asked, indent=2) + "\n")
        return []
    before = json.loads(manifest.read_text(encoding="utf-8"))
    return [name for name, value in asked.items() if before.get(name) != value]


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a small file under a temporary name, then renames it."""
    partial = path.with_name(f".{path.name}-{_token(path.parent)}{_PARTIAL}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _token(folder: Path) -> str:
    """A few letters that no other file in the folder has."""
    return Path(tempfile.mktemp(prefix="", dir=folder)).name
