"""`TuneConfig`: how to tune a model. Impossible combinations are refused when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from mixhead.errors import MixheadError

if TYPE_CHECKING:
    from mixhead.precision import Bf16

Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class TuneConfig:
    """How `tune` trains.

    Attributes:
        tokens: budget, in tokens read by all processes together; rounded down to whole optimizer steps. The windows are
            read in a new random order in each round through them.
        batch_size: windows in one forward pass of one process.
        gradient_accumulation: forward passes of one process in one optimizer step.
        learning_rate: the highest, reached after the warm-up.
        final_learning_rate: the one of the last step ("constant" ignores it).
        schedule: how it falls in between.
        router_learning_rate_factor: the routers' learning rate as a multiple of all others'.
        warmup: share of all steps in which the learning rate rises linearly, in [0, 1).
        weight_decay: of AdamW; biases, norms and routers are exempt.
        max_grad_norm: gradients are scaled down to this norm; infinity leaves them.
        bf16: whether the forward pass runs under autocast to bfloat16; "auto" where the machine multiplies it faster.
            Weights and optimizer stay as they are.
        gradient_checkpointing: keeps one activation per layer and computes the rest again: less memory, a third slower.
        distillation_weight: share w, in [0, 1], of the distillation in the loss, which is
            (1 - w) * cross entropy + w * temperature^2 KL(teacher || student) + balance loss.
        distillation_temperature: divides both models' logits inside the distillation.
        lora_rank: 0 trains every weight; else only low-rank updates of this rank (scaled by 2) and the routers are
            trained, and merged into the weights at the end (needs the package peft).
        balance_coefficient: replaces the converted model's own weight of the balance loss; None keeps it. It also
            stands in the saved model. A model without routers ignores it.
        seed: of the order of the windows, of dropout and of the low-rank updates.
        save_every: optimizer steps between checkpoints (one holds weights and optimizer: 12 bytes per trained weight).
        keep_checkpoints: how many of the newest checkpoints stay on the disk.
    """

    tokens: int = 1_000_000
    batch_size: int = 4
    gradient_accumulation: int = 1
    learning_rate: float = 5e-5
    final_learning_rate: float = 5e-6
    schedule: Schedule = "cosine"
    router_learning_rate_factor: float = 1.0
    warmup: float = 0.03
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    bf16: Bf16 = "auto"
    gradient_checkpointing: bool = False
    distillation_weight: float = 0.0
    distillation_temperature: float = 1.0
    lora_rank: int = 0
    balance_coefficient: float | None = None
    seed: int = 0
    save_every: int = 50
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        whole = {"tokens": 1, "batch_size": 1, "gradient_accumulation": 1, "save_every": 1, "keep_checkpoints": 1}
        for name, least in {**whole, "lora_rank": 0, "seed": 0}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise MixheadError(f"{name}={value!r} must be a whole number of at least {least}.")
        if not isinstance(self.bf16, bool) and self.bf16 != "auto":
            raise MixheadError(f'bf16={self.bf16!r} must be True, False or "auto".')
        if not isinstance(self.gradient_checkpointing, bool):
            raise MixheadError(f"gradient_checkpointing={self.gradient_checkpointing!r} must be True or False.")
        for name in ("learning_rate", "max_grad_norm", "distillation_temperature"):
            self._check_number(name, positive=True, infinity=name == "max_grad_norm")
        for name in ("final_learning_rate", "router_learning_rate_factor", "weight_decay", "warmup"):
            self._check_number(name)
        self._check_number("distillation_weight")
        if self.balance_coefficient is not None:
            self._check_number("balance_coefficient")
        if self.schedule not in get_args(Schedule):
            raise MixheadError(f"schedule={self.schedule!r} is unknown: choose one of {', '.join(get_args(Schedule))}.")
        if self.schedule != "constant" and self.final_learning_rate > self.learning_rate:
            raise MixheadError(
                f"final_learning_rate={self.final_learning_rate} exceeds learning_rate={self.learning_rate}: "
                "the learning rate can only fall."
            )
        if self.warmup >= 1.0:
            raise MixheadError(f"warmup={self.warmup} is a share of all steps and must be less than 1.")
        if self.distillation_weight > 1.0:
            raise MixheadError(f"distillation_weight={self.distillation_weight} is a share and must be at most 1.")
        if self.distillation_temperature != 1.0 and self.distillation_weight == 0.0:
            raise MixheadError(
                f"distillation_temperature={self.distillation_temperature} has no effect while distillation_weight is "
                "0: give a weight, or leave the temperature at 1."
            )

    def _check_number(self, name: str, positive: bool = False, infinity: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
        if not number or value < 0 or (positive and value == 0) or (math.isinf(value) and not infinity):
            wanted = "a positive number" if positive else "a number of at least 0"
            raise MixheadError(f"{name}={value!r} must be {wanted}.")

    def factor(self, step: int, steps: int) -> float:
        """The learning rate of a step (counted from 0) as a share of `learning_rate`."""
        warmup = math.ceil(self.warmup * steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return 1.0
        done = min((step - warmup) / max(steps - 1 - warmup, 1), 1.0)
        falling = 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        last = self.final_learning_rate / self.learning_rate
        return last + (1.0 - last) * falling
