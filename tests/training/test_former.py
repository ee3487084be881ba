"""Recipes of earlier versions are understood, and the log says what to write instead."""

import logging

import pytest

from mixhead.tasks.registry import settings_of
from mixhead.training.recipes import Recipe

IMAGES = {"data": "fashion-mnist", "model": {}}
MOA = {"model": {}, "vocabulary": 300, "data": "addresses"}
DIT = {"data": {"images": "emoji", "size": 8}, "model": {}}


@pytest.mark.parametrize(
    ("task", "former", "now", "said"),
    [
        ("masked_lm", {**MOA, "steps": 100, "warmup_steps": 25}, {"warmup": 0.25}, "`warmup_steps: 25` is `warmup: 0"),
        ("image_classification", {**IMAGES, "epochs": 5, "warmup_epochs": 1}, {"warmup": 0.2}, "`warmup: 0.2`"),
        ("image_classification", {**IMAGES, "warmup_epochs": 3}, {"warmup": 0.01}, "`warmup: 0.01`"),
        ("image_classification", {**IMAGES, "bf16": True}, {"precision": "bfloat16"}, "`precision: bfloat16`"),
        ("image_classification", {**IMAGES, "bf16": "auto"}, {"precision": "auto"}, "`precision: auto`"),
        (
            "class_conditional_generation",
            {**DIT, "training": {"steps": 50, "warmup": 5, "cooldown": 10, "bf16": False}},
            {"steps": 50, "warmup": 0.1, "cooldown": 0.2, "precision": "float32"},
            "the keys under `training` stand beside",
        ),
    ],
)  # fmt: skip
def test_former_keys_become_todays(task, former, now, said, caplog):
    with caplog.at_level(logging.WARNING, "mixhead"):
        settings = settings_of(Recipe("old", task, former))
    assert {name: getattr(settings, name) for name in now} == now
    assert said in caplog.text


def test_a_recipe_of_today_says_nothing(caplog):
    settings_of(Recipe("new", "masked_lm", {**MOA, "steps": 100, "warmup": 0.25}))
    assert not caplog.records
