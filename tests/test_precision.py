"""bfloat16 is taken where this machine multiplies it faster, which is measured, logged once, and settled for a run."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from mixhead import MixheadError, precision
from mixhead.precision import autocast_dtype
from mixhead.tasks.image_classification.config import ImageTrainConfig
from mixhead.tasks.image_classification.trainer import ImageTrainer
from mixhead.tasks.image_generation.small_classifier import ClassifierTrainer
from mixhead.tasks.image_generation.trainer import DiffusionTrainer
from mixhead.tasks.language_modelling.config import TuneConfig
from mixhead.tasks.moa_training import MoATrainConfig, MoATrainer
from mixhead.training.recipes import shipped_recipes
from mixhead.training.run import open_run


@pytest.fixture
def machine(monkeypatch):
    """Makes this a machine that multiplies in bfloat16 so many times as fast as in float32."""

    def of(factor: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(precision, "bfloat16_speed", lambda: factor)
        precision.faster_in_bfloat16.cache_clear()
        precision.warn_if_slower.cache_clear()

    yield of
    precision.faster_in_bfloat16.cache_clear()
    precision.warn_if_slower.cache_clear()


@pytest.mark.parametrize(("factor", "taken"), [(4.0, torch.bfloat16), (1.02, None), (0.04, None)])
def test_auto_takes_what_was_measured_to_be_faster(machine, factor, taken):
    machine(factor)
    assert autocast_dtype() is taken
    assert autocast_dtype("float32") is None
    assert autocast_dtype("bfloat16") is torch.bfloat16


@pytest.mark.parametrize(
    ("factor", "line"),
    [
        (4.0, "Computing in bfloat16: products of matrices take 0.25 times as long in bfloat16 as in float32 here."),
        (0.04, "Computing in float32: products of matrices take 25 times as long in bfloat16 as in float32 here."),
    ],
)
def test_one_line_says_which_and_why(machine, caplog, factor, line):
    machine(factor)
    with caplog.at_level(logging.INFO, "mixhead"):
        autocast_dtype()
        autocast_dtype()
    assert caplog.messages == [line]


def test_asking_for_emulated_bfloat16_warns_once_with_the_factor(machine, caplog):
    machine(0.04)
    autocast_dtype("bfloat16")
    autocast_dtype("bfloat16")
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "25 times as long" in record.getMessage()


def test_asking_for_bfloat16_that_is_no_slower_warns_of_nothing(machine, caplog):
    machine(1.0)
    autocast_dtype("bfloat16")
    assert not caplog.records


def test_the_machine_is_measured_once(monkeypatch):
    measured = []
    monkeypatch.setattr(precision, "products", lambda x_NC: measured.append(x_NC.dtype))
    precision.bfloat16_speed.cache_clear()
    assert precision.bfloat16_speed() == precision.bfloat16_speed() > 0.0
    assert measured == [torch.float32] * precision.TURNS + [torch.bfloat16] * precision.TURNS
    precision.bfloat16_speed.cache_clear()


def test_unknown_names_are_refused():
    with pytest.raises(MixheadError, match="dtype float8 is unknown: choose one of auto, float32, bfloat16"):
        autocast_dtype("float8")


# Settings and recipes


def test_every_default_that_may_be_bfloat16_follows_the_machine():
    assert TuneConfig().bf16 == "auto"
    assert ImageTrainConfig(model={}, data="").bf16 == "auto"
    assert MoATrainConfig(model={}, vocabulary=1, steps=1).bf16 == "auto"


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_no_recipe_insists_on_bfloat16(name):
    values = yaml.safe_load(shipped_recipes()[name].read_text(encoding="utf-8"))
    assert values.get("bf16", "auto") in ("auto", False)
    assert values.get("training", {}).get("bf16", False) in ("auto", False)


# Runs


@dataclass
class AnyTrainer:
    """As much of a trainer as opening a run takes."""

    run_folder: Path
    bf16: bool | str
    former_bf16: bool = True
    bf16_autocast: bool | None = None

    accelerator = SimpleNamespace(num_processes=1, is_main_process=True, wait_for_everyone=lambda: None)


def opened(run: Path, bf16: bool | str, passport: dict, resume: bool = True, former: bool = True) -> bool | None:
    """What a trainer computes in after its run was opened."""
    trainer = AnyTrainer(run, bf16, former)
    open_run(trainer, "recipe.json", passport, resume)
    return trainer.bf16_autocast


@pytest.mark.parametrize("factor", [4.0, 0.04])
def test_a_run_keeps_what_it_began_with_on_another_machine(machine, tmp_path, factor):
    machine(factor)
    began = opened(tmp_path, "auto", {"bf16": "auto"})
    assert began is (factor > 1.0)
    assert json.loads((tmp_path / "recipe.json").read_text())["bf16"] is began
    machine(1 / factor)
    assert opened(tmp_path, "auto", {"bf16": "auto"}) is began
    assert opened(tmp_path, began, {"bf16": began}) is began
    with pytest.raises(MixheadError, match=f"bf16 was {began} and is {not began}"):
        opened(tmp_path, not began, {"bf16": not began})


@pytest.mark.parametrize("began", [True, False])
@pytest.mark.parametrize(
    ("place", "former"), [(None, None), ("config", None), ("training", None), ("untold", True), ("untold", False)]
)
def test_runs_of_earlier_versions_go_on_as_they_began(machine, tmp_path, began, place, former):
    """They said it among their settings, or left it to a default of then."""
    if place == "untold":
        began = former
    passport = {None: {"bf16": began}, "untold": {"steps": 1}}.get(place, {place: {"bf16": began}})
    (tmp_path / "recipe.json").write_text(json.dumps({**passport, "processes": 1}))
    now = {None: {"bf16": "auto"}, "untold": {"steps": 1}}.get(place, {place: {"bf16": "auto"}})
    machine(0.04 if began else 4.0)
    assert opened(tmp_path, "auto", now, former=began) is began


def test_the_defaults_of_then():
    assert ImageTrainer.former_bf16 and MoATrainer.former_bf16
    assert not DiffusionTrainer.former_bf16 and not ClassifierTrainer.former_bf16


def test_a_manifest_that_cannot_be_read_is_refused(machine, tmp_path):
    (tmp_path / "recipe.json").write_text("{")
    machine(4.0)
    with pytest.raises(MixheadError, match="cannot be read"):
        opened(tmp_path, "auto", {})
