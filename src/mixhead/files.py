"""Files and folders that are either complete or absent.

Everything is written under a hidden name, `.NAME-PROCESS-….partial`, and renamed when it is complete. What a killed
process leaves under such a name is deleted when NAME is written next; what it was about to replace comes back.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mixhead.errors import MixheadError, first_line
from mixhead.processes import has_ended, this_process

logger = logging.getLogger(__name__)

_PARTIAL, _FORMER = ".partial", ".former"
_DAY = 24 * 3600.0  # seconds after which nobody writes any more, where the process cannot be asked

# What the writers raise when a disk is full: the operating system, safetensors and torch.save.
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


def partial_of(path: Path, suffix: str = _PARTIAL) -> Path:
    """A hidden name beside `path` that no other file has, and that says which process writes there."""
    token = Path(tempfile.mktemp(prefix="", dir=path.parent)).name
    return path.with_name(f".{path.name}-{this_process()}-{token}{suffix}")


def sweep(path: Path) -> None:
    """Deletes what killed processes left half-written beside `path`, and brings back what they were about to replace.

    What a process of another machine left, or an earlier version, is deleted in the name of `path` alone, after a day.
    """
    restore(path)
    for left in (*_left_beside(path, f".*{_PARTIAL}"), *_formers(path)):
        with contextlib.suppress(OSError):  # of another user, or swept by another process already
            remove(left)


def restore(path: Path) -> None:
    """Gives `path` back what stood there, where a process was killed between taking that away and replacing it."""
    if path.exists():
        return
    for former in _formers(path):
        with contextlib.suppress(OSError):  # read-only
            former.rename(path)
            logger.warning("A process was killed while it replaced %s: what stood there before is back.", path)
            return


def _formers(path: Path) -> list[Path]:
    """What stood at `path` when processes that have ended took it away."""
    return _left_beside(path, f".{glob.escape(path.name)}-*{_FORMER}")


def _left_beside(path: Path, pattern: str) -> list[Path]:
    """What matches and belongs to a process that has ended, or that nobody knows and that bears the name of `path`."""
    left = []
    for found in path.parent.glob(pattern):
        process = re.search(r"-([0-9a-f]+\.\d+\.\d+)-\w+$", found.stem)
        ended = has_ended(process[1]) if process else None
        with contextlib.suppress(OSError):
            own = found.name.startswith(f".{path.name}-")
            if ended or (ended is None and own and time.time() - found.lstat().st_mtime > _DAY):
                left.append(found)
    return left


def remove_partial(run: Path) -> None:
    """Deletes all that is half-written or half-deleted in a folder in which nobody else writes."""
    for path in run.glob(f".*{_PARTIAL}"):
        remove(path)


def remove(path: Path) -> None:
    """Deletes a file or folder so that it is never seen half-deleted under its own name."""
    if path.suffix not in (_PARTIAL, _FORMER):
        path = path.rename(partial_of(path))
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a folder under a temporary name, then puts it in place of whatever bore the name before."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder) as partial:
        write(partial)
        _usual_modes(partial)
        put_in_place(partial, folder)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` to make it in, which is gone when the block has ended."""
    sweep(path)
    partial = partial_of(path)
    try:
        partial.mkdir()
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, target: Path) -> None:
    """Renames the complete folder; what stood there before is deleted last, and comes back if the renaming fails."""
    if not target.exists():
        partial.rename(target)
        return
    former = target.rename(partial_of(target, _FORMER))
    try:
        partial.rename(target)
    except OSError:
        former.rename(target)
        raise
    remove(former)


def _usual_modes(folder: Path) -> None:
    """The files in a new folder may be read by whom the folder is for; safetensors writes for their owner alone."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary name for a file, which bears its own once the block has ended well."""
    sweep(path)
    partial = partial_of(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a small file whole or not at all; nothing is swept, since a folder may have very many of them."""
    partial = partial_of(path)
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    write_bytes(path, text.encode())


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        MixheadError: where it is missing, truncated, no JSON, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MixheadError(f"There is no file {file}.") from None
    except OSError as error:
        raise MixheadError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # ValueError: neither JSON nor UTF-8
        raise MixheadError(f"{file} is truncated or corrupt, and no JSON ({first_line(error)}).") from error
    if not isinstance(content, dict):
        raise MixheadError(f"{file} must hold a JSON object, but it holds a {type(content).__name__}.")
    return content


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
    before = read_json(manifest)
    return [name for name, value in asked.items() if before.get(name) != value]
