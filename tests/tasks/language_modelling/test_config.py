import math

import pytest

from mixhead import MixheadError
from mixhead.tasks.language_modelling.config import TuneConfig


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokens": 0}, "tokens=0 must be a whole number of at least 1"),
        ({"batch_size": 1.5}, "batch_size=1.5 must be a whole number"),
        ({"lora_rank": -1}, "lora_rank=-1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a positive number"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"final_learning_rate": 1.0}, "final_learning_rate=1.0 exceeds learning_rate"),
        ({"schedule": "stairs"}, "schedule='stairs' is unknown: choose one of cosine, linear, constant"),
        ({"warmup": 1.0}, "warmup=1.0 is a share"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be a number of at least 0"),
        ({"max_grad_norm": 0}, "max_grad_norm=0 must be a positive number"),
        ({"distillation_weight": 1.1}, "distillation_weight=1.1 is a share"),
        ({"distillation_temperature": 2.0}, "has no effect"),
        ({"balance_coefficient": math.inf}, "balance_coefficient=inf"),
        ({"bf16": 1}, "bf16=1 must be True, False or"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0"),
    ],
)
def test_impossible_configurations_are_refused(changes, sentence):
    with pytest.raises(MixheadError, match=sentence):
        TuneConfig(**changes)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates(schedule):
    config = TuneConfig(schedule=schedule, warmup=0.1)
    factors = [config.factor(step, 100) for step in range(100)]
    assert factors[:10] == sorted(factors[:10]) and factors[10] == 1.0 and 0 < factors[0] < 0.2
    assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
