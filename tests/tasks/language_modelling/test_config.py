import math

import pytest

from mixhead import MixheadError
from mixhead.tasks.language_modelling.config import TuneConfig


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokens": 0}, "tokens=0 must be at least 1"),
        ({"batch_size": 1.5}, "batch_size=1.5 must be a whole number"),
        ({"lora_rank": -1}, "lora_rank=-1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a positive number"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"final_learning_rate": 1.0}, "final_learning_rate=1.0 exceeds learning_rate"),
        ({"schedule": "stairs"}, "schedule='stairs' is unknown: choose one of 'constant', 'linear', 'cosine'"),
        ({"warmup": 1.0}, "warmup=1.0 must be less than 1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be at least 0"),
        ({"max_grad_norm": -1}, "max_grad_norm=-1 must be at least 0"),
        ({"distillation_weight": 1.1}, "distillation_weight=1.1 must be at most 1"),
        ({"distillation_temperature": 2.0}, "has no effect"),
        ({"balance_coefficient": math.inf}, "balance_coefficient=inf"),
        ({"precision": "float8"}, "precision='float8' is unknown: choose one of 'auto', 'float32' or 'bfloat16'"),
        ({"gradient_checkpointing": "perhaps"}, "gradient_checkpointing='perhaps' must be true or false"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0"),
    ],
)
def test_impossible_configurations_are_refused(changes, sentence):
    with pytest.raises(MixheadError, match=sentence):
        TuneConfig(**changes)
