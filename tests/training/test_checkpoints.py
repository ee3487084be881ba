"""A checkpoint is compared with its check sums before anything is loaded, and what is wrong with one is said."""

import json
import logging
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from line_task import line, losses

from mixhead.errors import MixheadError
from mixhead.tasks.registry import train_recipe
from mixhead.training.checkpoints import SUMS, check, checkpoints, read_weights, write_sums

ASKED = line(steps=25)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    from line_task import LINE

    from mixhead.tasks.registry import TASKS

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "line", LINE)
        return train_recipe(ASKED, tmp_path_factory.mktemp("line") / "run").folder.parent


@pytest.fixture
def stopped(whole, tmp_path):
    """The run after 20 of its 25 steps, with the checkpoints of steps 10 and 20."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("recipe.yaml", "fingerprint.json", "log.csv"):
        shutil.copy(whole / name, run / name)
    shutil.copytree(whole / "checkpoint-20", run / "checkpoint-20")
    shutil.copytree(whole / "checkpoint-20", run / "checkpoint-10")
    state = json.loads((run / "checkpoint-10" / "trainer_state.json").read_text())
    (run / "checkpoint-10" / "trainer_state.json").write_text(json.dumps({**state, "global_step": 10}))
    (run / "checkpoint-10" / SUMS).unlink()
    write_sums(run / "checkpoint-10")
    return run


def resumed(run: Path):
    return train_recipe(ASKED, run, resume=True)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("executed").absolute(),))


def make_hostile(file: Path) -> None:
    torch.save({"python": Harmful()}, file)


def test_every_file_has_a_check_sum_that_the_command_of_the_system_reads(whole):
    checkpoint = whole / "checkpoint-20"
    listed = [row.split("  ")[1] for row in (checkpoint / SUMS).read_text().splitlines()]
    assert listed == sorted(file.name for file in checkpoint.iterdir() if file.name != SUMS)
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= {*listed}
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--quiet", SUMS], cwd=checkpoint, check=True)


def test_a_whole_checkpoint_is_gone_on_from(whole, stopped, caplog):
    with caplog.at_level(logging.INFO, "mixhead"):
        assert resumed(stopped).resumed_from == 20
    assert losses(stopped) == losses(whole) and "check sums" not in caplog.text


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("damage", [cut, flip_a_bit, Path.unlink, make_hostile])
def test_whatever_is_wrong_with_a_file_is_found_before_anything_is_loaded(stopped, name, damage, monkeypatch):
    monkeypatch.chdir(stopped.parent)
    damage(stopped / "checkpoint-20" / name)
    with pytest.raises(MixheadError) as raised:
        resumed(stopped)
    what = "is missing" if damage is Path.unlink else "is not what was written there"
    assert f"checkpoint-20 is damaged or belongs to another model ({name} {what}" in str(raised.value)
    assert "checkpoint-10 before it is whole: delete the damaged folder to continue from there" in str(raised.value)
    assert not Path("executed").exists()
    shutil.rmtree(stopped / "checkpoint-20")
    assert resumed(stopped).resumed_from == 10


def test_a_list_that_is_cut_short_is_no_list(stopped):
    for share in (0.0, 0.2, 0.95):
        text = (stopped / "checkpoint-20" / SUMS).read_text()
        (stopped / "checkpoint-20" / SUMS).write_text(text[: int(share * len(text))])
        with pytest.raises(MixheadError, match=r"is damaged.*SHA256SUMS"):
            check(stopped / "checkpoint-20")
        (stopped / "checkpoint-20" / SUMS).write_text(text)
    (stopped / "checkpoint-20" / SUMS).write_text("\n".join(text.splitlines()[1:]) + "\n")
    with pytest.raises(MixheadError, match="is not in the list SHA256SUMS"):
        check(stopped / "checkpoint-20")
    (stopped / "checkpoint-20" / SUMS).write_text("0" * 64 + "  ../../secret\n")
    with pytest.raises(MixheadError, match="SHA256SUMS is no list of check sums"):
        check(stopped / "checkpoint-20")


def test_where_no_checkpoint_is_whole_the_run_begins_again(stopped):
    for checkpoint in checkpoints(stopped):
        flip_a_bit(checkpoint / "model.safetensors")
    with pytest.raises(MixheadError, match="no checkpoint before it is whole: begin the run again in another folder"):
        resumed(stopped)


# Checkpoints of earlier versions, which have no check sums


@pytest.fixture
def former(stopped):
    for checkpoint in checkpoints(stopped):
        (checkpoint / SUMS).unlink()
    return stopped


def test_a_checkpoint_of_an_earlier_version_is_taken_with_a_line_in_the_log(whole, former, caplog):
    with caplog.at_level(logging.INFO, "mixhead"):
        assert resumed(former).resumed_from == 20
    assert losses(former) == losses(whole)
    assert [r.getMessage() for r in caplog.records if "check sums" in r.getMessage()] == [
        f"{former / 'checkpoint-20'} is of an earlier version, which wrote no check sums: it is taken as it is."
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", [cut, Path.unlink, make_hostile])
def test_what_can_be_found_wrong_without_check_sums_is_said(former, name, damage, monkeypatch):
    monkeypatch.chdir(former.parent)
    damage(former / "checkpoint-20" / name)
    with pytest.raises(MixheadError, match=r"checkpoint-20 is damaged.*checkpoint-10 before it is whole"):
        resumed(former)
    assert not Path("executed").exists()


@pytest.mark.parametrize("text", ["{}", "[]", "", "null", "[" * 100_000, '{"global_step": 7}'])
def test_a_state_that_is_none_is_refused(former, text):
    (former / "checkpoint-20" / "trainer_state.json").write_text(text)
    with pytest.raises(MixheadError, match=r"checkpoint-20 is damaged.*trainer_state\.json"):
        resumed(former)


def test_a_pickle_of_something_else_is_not_executed(former, monkeypatch):
    monkeypatch.chdir(former.parent)
    (former / "checkpoint-20" / "rng_state.pth").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(MixheadError, match=r"damaged.*rng_state\.pth.*nothing in it was executed") as raised:
        resumed(former)
    assert "weights_only" not in str(raised.value)  # PyTorch's advice, to execute it
    assert not Path("executed").exists()


# Weights in several files


@pytest.mark.parametrize(
    "index",
    [
        "[]", "{}", "null", '"text"', "[" * 100_000, '{"weight_map": []}', '{"weight_map": {"weight": 7}}',
        '{"weight_map": {"weight": ["model.safetensors"]}}', '{"weight_map": {"weight": "../other/model.safetensors"}}',
        '{"weight_map": {"weight": "absent.safetensors"}}',
    ],
)  # fmt: skip
def test_an_index_that_leads_nowhere_or_elsewhere_is_refused(tmp_path, whole, index):
    for name in ("other", "checkpoint-3"):
        shutil.copytree(whole / "checkpoint-20", tmp_path / name)
    (tmp_path / "checkpoint-3" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(MixheadError, match="checkpoint-3 is damaged"):
        read_weights(tmp_path / "checkpoint-3")
