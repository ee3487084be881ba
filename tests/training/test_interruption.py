"""What comes between: another run in the folder, a signal, a full disk, a log that is none."""

import csv
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from line_task import LineTrainer, line, losses

from mixhead.cli.app import run as command
from mixhead.errors import MixheadError
from mixhead.files import write_folder
from mixhead.tasks.registry import train_recipe
from mixhead.training.checkpoints import checkpoints
from mixhead.training.lock import LOCK, only_run_in
from mixhead.training.progress import StepLog, read_rows

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}

HOLD = """
import os, sys, time
from pathlib import Path
from mixhead.training.lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    if not os.fork():
        print("held", flush=True)  # by the child, which has let go of the lock by then
    time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_refused_and_the_first_is_left_alone(tmp_path):
    train_recipe(line(steps=5), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != LOCK}
    refused = pytest.raises(MixheadError, match=rf"run is in use by another run \(process {os.getpid()} on ")
    with only_run_in(tmp_path / "run"), refused:
        train_recipe(line(steps=5), tmp_path / "run", resume=True)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.name != LOCK} == before
    assert train_recipe(line(steps=5), tmp_path / "run", resume=True).resumed_from == 5


def test_a_run_that_cannot_begin_is_refused_before_its_model_is_built(tmp_path, monkeypatch):
    train_recipe(line(steps=5), tmp_path / "run")
    monkeypatch.setattr(LineTrainer, "__init__", lambda *_: pytest.fail("was built"))
    with only_run_in(tmp_path / "run"), pytest.raises(MixheadError, match="in use by another run"):
        train_recipe(line(steps=5), tmp_path / "run", resume=True)


def test_a_process_that_is_killed_holds_no_lock_though_its_children_live(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], env=ENVIRONMENT, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(MixheadError, match=rf"in use by another run \(process {holder.pid} on"),
            only_run_in(tmp_path),
        ):
            pass
        holder.kill()
        holder.wait()
        with only_run_in(tmp_path):
            assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_the_file_of_a_lock_that_nobody_holds_says_nothing(tmp_path):
    (tmp_path / LOCK).write_text("process 1 on another machine since yesterday\n")
    assert train_recipe(line(steps=5), tmp_path).resumed_from == 0


def test_where_files_cannot_be_locked_a_run_warns_and_goes_on(tmp_path, monkeypatch, caplog):
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_run_in(tmp_path):
        assert "cannot be locked" in caplog.text


# Signals


def signalled(monkeypatch, number: int, step: int) -> None:
    """The process gets a signal after that step."""
    write = StepLog.write

    def send(self, row):
        write(self, row)
        if row["step"] == step:
            signal.raise_signal(number)

    monkeypatch.setattr(StepLog, "write", send)


def test_sigterm_saves_and_ends_as_schedulers_expect(tmp_path, monkeypatch):
    train_recipe(line(), tmp_path / "whole")
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, 7)
        with pytest.raises(SystemExit) as ended:
            train_recipe(line(), tmp_path / "run")
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-7"]
    assert train_recipe(line(), tmp_path / "run", resume=True).resumed_from == 7
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_ends_with_the_code_of_the_signal(tmp_path, monkeypatch, number, code, capsys):
    (tmp_path / "line.yaml").write_text("task: line\nlearning_rate: 0.3\nprecision: float32\n")
    signalled(monkeypatch, number, 3)
    assert command(["train", str(tmp_path / "line.yaml"), "--run", str(tmp_path / "run")]) == code
    said = " ".join(capsys.readouterr().err.split())
    assert "was stopped after step 3 of 40" in said and "--resume" in said


READS = """
import sys
from pathlib import Path
from line_task import LINE, line
from mixhead.cli.app import log_on_standard_error
from mixhead.tasks.registry import TASKS, train_recipe
TASKS["line"] = LINE
with log_on_standard_error():
    train_recipe(line(steps=10**6, dataloader_workers=1, save_every=10**6), Path(sys.argv[1]))
"""


def test_a_scheduler_may_signal_the_processes_that_read_data_too(tmp_path):
    command = [sys.executable, "-c", READS, str(tmp_path / "run")]
    started = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while started.poll() is None and len(read_rows(tmp_path / "run" / "log.csv")) < 3:
            time.sleep(0.05)
        os.killpg(started.pid, signal.SIGTERM)
        said = started.communicate(timeout=60)[1]
    finally:
        started.kill()
    assert started.returncode == 143, said
    assert len(checkpoints(tmp_path / "run")) == 1 and said.count("Stopping after this step") == 1


# The log


def test_a_full_disk_while_the_log_is_written_says_how_to_go_on(tmp_path, monkeypatch):
    begin = StepLog.__init__

    def on_a_full_disk(self, *arguments):
        begin(self, *arguments)
        self._file = Path("/dev/full").open("a", newline="")  # noqa: SIM115 (closed by the log)
        self._writer = csv.DictWriter(self._file, self._columns, lineterminator="\n")

    train_recipe(line(steps=10), tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(
        (tmp_path / "run" / "recipe.yaml").read_text().replace("steps: 10\n", "steps: 40\n")
    )
    monkeypatch.setattr(StepLog, "__init__", on_a_full_disk)
    with pytest.raises(MixheadError, match=r"No space left on device.*checkpoint-10 is complete: resume=True"):
        train_recipe(line(), tmp_path / "run", resume=True)


def test_a_full_disk_before_the_first_row_says_so_too(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "log.csv")

    monkeypatch.setattr("mixhead.training.progress.write_text", full)
    with pytest.raises(MixheadError, match=r"No space left on device \(log\.csv\)\. No checkpoint was written yet"):
        train_recipe(line(), tmp_path / "run")


@pytest.mark.parametrize(
    "content", [bytes(range(256)), b"step,\xff\n1,2\n", b'step,loss\n1,"' + b"x" * 200_000 + b'"\n']
)
def test_a_log_that_is_none_is_refused_in_a_sentence(tmp_path, content):
    train_recipe(line(steps=10), tmp_path / "run")
    (tmp_path / "run" / "log.csv").write_bytes(content)
    with pytest.raises(MixheadError, match=r"log\.csv cannot be read as a log .*: move it away"):
        train_recipe(line(steps=10), tmp_path / "run", resume=True)


def test_rows_that_are_none_are_left_out(tmp_path):
    (tmp_path / "log.csv").write_text(
        "step,loss,seconds\n1,2,3\n²,2,3\nx,y,z\n4\n5,6,7,8\n9,9,soon\n", encoding="utf-8"
    )
    assert [row["step"] for row in read_rows(tmp_path / "log.csv")] == ["1", "5", "9"]
    StepLog(tmp_path / "log.csv", ("step", "loss", "seconds"), 9).close()


def test_sigterm_ends_any_command_in_order(tmp_path, monkeypatch):
    """What it was writing is deleted, as after an error."""

    def write(partial):
        (partial / "half").write_text("x")
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("mixhead.cli.fetch.fetch_data", lambda *_, **__: write_folder(tmp_path / "data", write))
    before = signal.getsignal(signal.SIGTERM)
    assert command(["fetch", "emoji"]) == 143
    assert not [*tmp_path.iterdir()] and signal.getsignal(signal.SIGTERM) is before
