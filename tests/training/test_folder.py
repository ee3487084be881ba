"""The folder of a run: what was asked for stands in it, runs again, and guards what is continued."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import yaml

from mixhead.errors import MixheadError
from mixhead.settings import Count, Source
from mixhead.training.config import RunConfig
from mixhead.training.folder import opened_run


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    data: Annotated[str, Source(("known",))] = "known"
    steps: Count = 100


@dataclass
class AnyTrainer:
    """As much of a trainer as opening a run takes."""

    run_folder: Path
    config: RunConfig
    data: str = "that"
    bfloat16: bool | None = None

    accelerator = SimpleNamespace(num_processes=1, is_main_process=True)

    def fingerprint(self) -> dict[str, Any]:
        return {"sha256": self.data}


def opened(run: Path, config: RunConfig, resume: bool = True, data: str = "that", task: str = "toy") -> bool | None:
    """What a trainer computes in after its run was opened."""
    trainer = AnyTrainer(run, config, data)
    with opened_run(trainer, task, resume) as done:
        assert done == 0
    return trainer.bfloat16


def test_the_recipe_holds_every_setting_and_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    opened(tmp_path / "run", Config(data="pictures", precision="float32", learning_rate=1e-5))
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    assert text.startswith("# ")
    values = yaml.safe_load(text)
    assert values.pop("task") == "toy" and values["data"] == str(tmp_path / "pictures")
    assert Config(**values) == Config(data="pictures", precision="float32", learning_rate=1e-5)
    facts = json.loads((tmp_path / "run" / "fingerprint.json").read_text())
    assert facts["processes"] == 1 and facts["sha256"] == "that" and "torch" in facts["versions"]


def test_only_the_same_run_is_continued(tmp_path):
    config = Config(precision="float32")
    opened(tmp_path, config, resume=False)
    with pytest.raises(MixheadError, match="holds a run already"):
        opened(tmp_path, config, resume=False)
    opened(tmp_path, replace(config, save_every=7, dataloader_workers=2))
    with pytest.raises(MixheadError, match="seed was 0 and is 3"):
        opened(tmp_path, replace(config, seed=3))
    with pytest.raises(MixheadError, match="sha256 was 'that' and is 'other'"):
        opened(tmp_path, config, data="other")
    with pytest.raises(MixheadError, match="a run of another task, toy"):
        opened(tmp_path, config, task="game")


@pytest.mark.parametrize("factor", [4.0, 0.04])
def test_a_run_keeps_what_it_began_with_on_another_machine(machine, tmp_path, factor):
    machine(factor)
    began = opened(tmp_path, Config())
    assert began is (factor > 1.0)
    names = {True: "bfloat16", False: "float32"}
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["precision"] == names[began]
    machine(1 / factor)
    assert opened(tmp_path, Config()) is began
    assert opened(tmp_path, Config(precision=names[began])) is began
    with pytest.raises(MixheadError, match=f"precision was '{names[began]}' and is '{names[not began]}'"):
        opened(tmp_path, Config(precision=names[not began]))


@pytest.mark.parametrize("name", ["recipe.json", "run.json"])
def test_runs_of_earlier_versions_go_on_as_they_began(machine, tmp_path, name):
    """What they left out had a default of then: forward passes were in bfloat16."""
    machine(0.04)
    former = {"recipe": "toy", "task": "toy", "steps": 50, "warmup_steps": 10, "processes": 1, "sha256": "that"}
    former.pop("sha256")
    (tmp_path / name).write_text(json.dumps(former))
    assert opened(tmp_path, Config(steps=50, warmup=0.2)) is True
    assert (tmp_path / "recipe.yaml").is_file()


@pytest.mark.parametrize("place", ["settings", "beside", "training"])
@pytest.mark.parametrize("began", [True, False])
def test_the_precision_of_earlier_versions(machine, tmp_path, place, began):
    machine(0.04 if began else 4.0)
    task = "class_conditional_generation" if place == "training" else "toy"
    settings: dict[str, Any] = {"steps": 50, "bf16": began}
    former = {"task": task, **({"training": settings} if place == "training" else settings), "processes": 1}
    if place == "beside":  # decided when the run began
        former = {"task": task, "steps": 50, "processes": 1, "bf16": began}
    (tmp_path / "run.json").write_text(json.dumps(former))
    assert opened(tmp_path, Config(steps=50), task=task) is began


def test_what_a_former_run_tuned_is_compared(tmp_path):
    config = {"steps": 50, "bf16": False, "warmup": 0.1}
    former = {"config": config, "model": "Llama", "parameters": 3, "windows_sha256": "x", "processes": 1}
    (tmp_path / "tune.json").write_text(json.dumps(former))
    trainer = AnyTrainer(tmp_path, Config(steps=50, warmup=0.1))
    trainer.fingerprint = lambda: {"architecture": "Llama", "parameters": 3, "windows_sha256": "x"}
    with opened_run(trainer, "language_modelling", True) as done:
        assert done == 0 and trainer.bfloat16 is False
    (tmp_path / "recipe.yaml").unlink()
    trainer.fingerprint = lambda: {"architecture": "Llama", "parameters": 3, "windows_sha256": "y"}
    with (
        pytest.raises(MixheadError, match="windows_sha256 was 'x' and is 'y'"),
        opened_run(trainer, "language_modelling", True),
    ):
        pass


def test_former_settings_that_no_run_can_have_are_refused_in_a_sentence(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"task": "toy", "steps": 5, "warmup_steps": 9, "processes": 1}))
    with pytest.raises(MixheadError, match=r"earlier version .warmup=1\.8 must be less than 1.* finish it with that"):
        opened(tmp_path, Config(steps=5))


@pytest.mark.parametrize("name", ["recipe.yaml", "recipe.json"])
@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 10_000, '{"task": 7, "training": "none"}', "\x00\xff"])
def test_a_manifest_that_cannot_be_read_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(MixheadError, match="cannot be read"):
        opened(tmp_path, Config())
