"""bfloat16 is taken where this machine multiplies it faster, which is measured, logged once, and settled for a run."""

import logging

import pytest
import torch
import yaml

from mixhead import MixheadError, precision
from mixhead.precision import autocast_dtype
from mixhead.tasks.image_classification.config import ImageTrainConfig
from mixhead.tasks.language_modelling.config import TuneConfig
from mixhead.tasks.moa_training import MoATrainConfig
from mixhead.training.recipes import shipped_recipes


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
    assert TuneConfig().precision == "auto"
    assert ImageTrainConfig(model={}, data="").precision == "auto"
    assert MoATrainConfig(model={}, vocabulary=1, steps=1).precision == "auto"


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_no_recipe_insists_on_bfloat16(name):
    values = yaml.safe_load(shipped_recipes()[name].read_text(encoding="utf-8"))
    assert values.get("precision", "auto") in ("auto", "float32")
