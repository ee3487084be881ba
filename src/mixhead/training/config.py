"""`RunConfig`: what every training run can be told. A task adds its own settings in a subclass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from mixhead.errors import MixheadError
from mixhead.settings import Count, Natural, NotNegative, Positive, Settings, Share

Precision = Literal["auto", "float32", "bfloat16"]
Schedule = Literal["constant", "linear", "cosine", "timm_cosine", "inverse_sqrt", "warmup_stable_decay"]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """How a run goes, whatever it trains.

    Attributes:
        gradient_accumulation: forward passes of one process in one optimizer step.
        learning_rate: the highest, reached after the warm-up.
        schedule: what follows the warm-up: "constant"; "linear" or "cosine", down to `final_learning_rate` at the last
            step; "timm_cosine", which spans the steps of the warm-up as well; "inverse_sqrt", with 1 / sqrt(step);
            "warmup_stable_decay", constant until the cool-down.
        warmup: share of all steps in which the learning rate rises linearly, in [0, 1).
        warmup_learning_rate: of the first step ("timm_cosine" alone; the others begin one step above 0).
        final_learning_rate: of the last step ("linear", "cosine", "timm_cosine").
        cooldown: share of all steps, at the end, in which the learning rate falls to 0 ("warmup_stable_decay").
        weight_decay: of AdamW; which weights are exempt, the task says.
        max_grad_norm: gradients are scaled down to this norm; 0 or infinity leaves them.
        precision: of forward passes: "float32"; "bfloat16" by autocast, weights and optimizer stay as they are; "auto"
            where the machine multiplies it faster.
        gradient_checkpointing: keeps one activation per layer and computes the rest again: less memory, a third slower.
        seed: of weights, order, dropout and all else that is random.
        save_every: optimizer steps between checkpoints.
        keep_checkpoints: how many of the newest checkpoints stay on the disk.
        dataloader_workers: processes that read data, for each training process.
    """

    gradient_accumulation: Count = 1
    learning_rate: Positive = 1e-3
    schedule: Schedule = "constant"
    warmup: Share = 0.0
    warmup_learning_rate: NotNegative = 0.0
    final_learning_rate: NotNegative = 0.0
    cooldown: Share = 0.0
    weight_decay: NotNegative = 0.0
    max_grad_norm: Annotated[float, Ge(0)] = math.inf
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    seed: Natural = 0
    save_every: Positive = 500
    keep_checkpoints: Count = 2
    dataloader_workers: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        falls = self.schedule in ("linear", "cosine", "timm_cosine")
        for name in ("final_learning_rate", "warmup_learning_rate") if falls else ():
            if getattr(self, name) > self.learning_rate:
                raise MixheadError(
                    f"{name}={getattr(self, name)} exceeds learning_rate={self.learning_rate}, which is the highest."
                )
        if self.schedule == "linear" and self.final_learning_rate == self.learning_rate:
            raise MixheadError("final_learning_rate equals learning_rate, so nothing falls: write schedule: constant.")
        if self.warmup + self.cooldown > 1:
            raise MixheadError(
                f"warmup={self.warmup} and cooldown={self.cooldown} are shares of all steps: together at most 1."
            )
