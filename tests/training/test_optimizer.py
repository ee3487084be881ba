"""What decays, and how the learning rate goes: the schedules of transformers, from their second step on."""

import math

import pytest
import torch
from torch import nn

from mixhead.errors import MixheadError
from mixhead.training.config import RunConfig
from mixhead.training.optimizer import adamw, schedule


def rates(config: RunConfig, steps: int) -> list[float]:
    """The learning rate of every step, as a share of the highest."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = schedule(optimizer, config, steps)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0] / config.learning_rate)
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_the_rate_rises_and_ends_at_the_last_step_where_it_should(name):
    found = rates(RunConfig(schedule=name, warmup=0.1, learning_rate=1e-3, final_learning_rate=1e-4), 100)
    assert found[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert found[-1] == pytest.approx(1.0 if name == "constant" else 0.1)
    assert found[10:] == sorted(found[10:], reverse=True)
    halfway = {"constant": 1.0, "linear": 0.55, "cosine": 0.55}[name]
    assert found[10 + 89 // 2] == pytest.approx(halfway, abs=0.02)


def test_the_inverse_square_root():
    found = rates(RunConfig(schedule="inverse_sqrt", warmup=0.2), 50)
    assert found[10] == 1.0
    assert found[40] == pytest.approx(0.5)
    assert found[49] == pytest.approx(math.sqrt(10 / 49))


def test_a_cool_down_falls_to_0_after_the_last_step():
    found = rates(RunConfig(schedule="warmup_stable_decay", warmup=0.1, cooldown=0.25), 20)
    assert found == pytest.approx([1 / 3, 2 / 3, *[1.0] * 14, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt", "warmup_stable_decay", "timm_cosine"])
@pytest.mark.parametrize("steps", [1, 2])
def test_no_step_of_a_short_run_is_lost(name, steps):
    assert all(rate > 0 for rate in rates(RunConfig(schedule=name, warmup=0.03, warmup_learning_rate=1e-6), steps)[:1])


def test_matrices_decay_and_what_a_task_exempts_does_not():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    config = RunConfig(weight_decay=0.1, learning_rate=0.5)

    def group_of(name, parameter):
        return "router" if name.startswith("2.") else "decay" if parameter.dim() > 1 else "keep"

    groups = adamw(model, config, group_of, router_factor=0.1, betas=(0.8, 0.9)).param_groups
    assert [(g["kind"], g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("decay", 0.5, 0.1, 1),
        ("keep", 0.5, 0.0, 3),
        ("router", 0.05, 0.0, 2),
    ]
    assert all(g["betas"] == (0.8, 0.9) for g in groups)
    with pytest.raises(MixheadError, match="nothing to train"):
        adamw(model.requires_grad_(False), config, group_of)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"warmup": 0.6, "cooldown": 0.5}, "together at most 1"),
        ({"schedule": "linear", "final_learning_rate": 1e-3}, "write schedule: constant"),
        ({"schedule": "cosine", "final_learning_rate": 1.0}, "final_learning_rate=1.0 exceeds"),
        ({"learning_rate": math.inf}, "learning_rate=inf must be a finite number"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"save_every": 0}, "save_every=0 must be a positive number"),
        ({"gradient_accumulation": 1.5}, "gradient_accumulation=1.5 must be a whole number"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, sentence):
    with pytest.raises(MixheadError, match=sentence):
        RunConfig(**changes)
