"""What is written is whole or absent, and what killed processes left is found and cleared away."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros

from mixhead import files, processes
from mixhead.errors import MixheadError

WRITE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from mixhead import files
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if {place!r} == "between":
    files.put_in_place.__globals__["Path"].rename, rename = (
        lambda self, target: die() if self.suffix == ".partial" else rename(self, target), Path.rename
    )
if {place!r} == "before the former is gone":
    files.put_in_place.__globals__["remove"] = die
def write(partial):
    (partial / "file").write_text("new")
    if {place!r} == "writing":
        die()
files.write_folder(Path(sys.argv[1]), write)
"""


def killed(folder: Path, place: str) -> None:
    """A process writes a folder and is killed in a place."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITE_AND_DIE.format(place=place), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def write(folder: Path, text: str) -> None:
    files.write_folder(folder, lambda partial: (partial / "file").write_text(text))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_keeps_the_model_that_was_there(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")

    def fill(partial):
        (partial / "new").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_folder(tmp_path / "model", fill)
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "old").exists()


def test_what_a_killed_process_was_writing_goes_with_the_next_write_beside_it(tmp_path):
    killed(tmp_path / "model", "writing")
    [left] = names(tmp_path)
    assert left.startswith(".model-") and left.endswith(".partial")
    write(tmp_path / "other", "x")
    assert names(tmp_path) == ["other"], "whatever its name was to be"


def test_what_a_killed_process_was_replacing_comes_back(tmp_path, caplog):
    write(tmp_path / "model", "old")
    killed(tmp_path / "model", "between")
    assert not (tmp_path / "model").exists()
    files.restore(tmp_path / "model")
    assert (tmp_path / "model" / "file").read_text() == "old"
    assert "killed while it replaced" in caplog.text
    killed(tmp_path / "model", "between")
    write(tmp_path / "model", "newest")
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "file").read_text() == "newest"


def test_what_was_replaced_goes_where_the_new_one_stands(tmp_path):
    write(tmp_path / "model", "old")
    killed(tmp_path / "model", "before the former is gone")
    assert (tmp_path / "model" / "file").read_text() == "new" and len(names(tmp_path)) == 2
    files.restore(tmp_path / "model")
    assert (tmp_path / "model" / "file").read_text() == "new"
    write(tmp_path / "model", "newer")
    assert names(tmp_path) == ["model"]


def test_what_living_and_unknown_processes_write_is_left_alone(tmp_path):
    mine = files.partial_of(tmp_path / "model")
    other = tmp_path / ".model-elsewhere.12.34-abc.partial"
    former = tmp_path / ".model-k3w9x_ab.partial"  # as earlier versions named them
    foreign = tmp_path / ".notes.partial"  # none of ours
    for path in (mine, other, former, foreign):
        path.mkdir()
    write(tmp_path / "model", "x")
    assert names(tmp_path) == sorted([mine.name, other.name, former.name, foreign.name, "model"])
    for path in (mine, other, former, foreign):
        os.utime(path, times=(time.time() - 1e5,) * 2)
    write(tmp_path / "model", "x")
    assert names(tmp_path) == sorted([mine.name, foreign.name, "model"]), "a day later nobody writes any more"


def test_a_process_is_known_by_its_number_and_its_start():
    here = processes.this_process()
    place, pid, started = here.split(".")
    assert processes.has_ended(here) is False
    assert processes.has_ended(f"{place}.{pid}.{int(started) + 1}") is True, "the number was given again"
    assert processes.has_ended(f"0{place[1:]}x.{pid}.{started}") is None, "another machine"
    assert processes.has_ended("k3w9x_ab") is None
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = processes._started(child.pid)
    assert processes.has_ended(f"{place}.{child.pid}.{started}") is False
    child.kill()
    while processes._started(child.pid) == started:
        time.sleep(0.01)
    assert processes.has_ended(f"{place}.{child.pid}.{started}") is True, "dead, though nobody has waited for it"
    child.communicate()
    assert processes.has_ended(f"{place}.{child.pid}.{started}") is True


def test_weights_may_be_read_by_whom_their_neighbours_may(tmp_path):
    def fill(partial):
        save_file({"x": zeros(2)}, partial / "model.safetensors")
        (partial / "config.json").write_text("{}")

    umask = os.umask(0o027)
    try:
        files.write_folder(tmp_path / "model", fill)
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o640}


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "\ud800"])
def test_what_is_no_json_object_is_refused_in_a_sentence(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("utf-16", "surrogatepass"))
    with pytest.raises(MixheadError, match=r"x\.json is truncated or corrupt"):
        files.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(MixheadError, match=r"x\.json (is truncated or corrupt|must hold)"):
        files.read_json(tmp_path / "x.json")
    with pytest.raises(MixheadError, match="There is no file"):
        files.read_json(tmp_path / "y.json")
