"""What the trainings of MoA models share: their loss in the log, Adam, the inverse-square-root schedule, averaging."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Seq2SeqTrainer, Seq2SeqTrainingArguments

from mixhead.data.token_batches import RunBatches
from mixhead.errors import MixheadError
from mixhead.files import write_folder
from mixhead.models.moa import MoAConfig, MoAEncoderConfig, MoATransformerConfig
from mixhead.models.moa.modeling import MoAPreTrainedModel, step_share
from mixhead.precision import Bf16
from mixhead.training.checkpoints import checkpoints
from mixhead.training.health import HEALTH
from mixhead.training.trainer import CHECKPOINTING, RunMixin, training_arguments

BETAS, EPSILON = (0.9, 0.98), 1e-9  # of Adam, as published
FIRST_LEARNING_RATE = 1e-7


@dataclass(frozen=True, kw_only=True)
class MoATrainConfig:
    """How a MoA model, or a dense one of the same shape, is trained; the defaults are the published recipe.

    Attributes:
        model: `name` of a configuration, and fields that differ from it (without a name: from the defaults).
        vocabulary: size of a vocabulary to train on the training data, or the folder of one.
        steps: optimizer steps.
        gradient_accumulation: forward passes of one process in one optimizer step.
        learning_rate: of Adam, reached at the end of the warm-up; then it falls with 1 / sqrt(step).
        warmup_steps: in which the learning rate rises linearly.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        bf16: whether forward passes run under autocast to bfloat16; "auto" where the machine multiplies it faster.
        gradient_checkpointing: keeps one activation per layer and computes the rest again.
        save_every: optimizer steps between checkpoints.
        average: the model is the mean of that many of the last checkpoints.
        seed: of weights, order and dropout.
    """

    model: Mapping[str, Any]
    vocabulary: int | str
    steps: int
    gradient_accumulation: int = 1
    learning_rate: float = 7e-4
    warmup_steps: int = 4000
    max_grad_norm: float = 0.0
    bf16: Bf16 = "auto"
    gradient_checkpointing: bool = False
    save_every: int = 1000
    average: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "gradient_accumulation", "warmup_steps", "save_every", "average"):
            if getattr(self, name) < 1:
                raise MixheadError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0.0 < self.learning_rate < math.inf:
            raise MixheadError(f"learning_rate={self.learning_rate} must be a positive number.")
        if self.max_grad_norm < 0.0 or self.seed < 0:
            raise MixheadError("max_grad_norm and seed must not be negative.")

    def factor(self, step: int) -> float:
        """The learning rate of a step (counted from 0) as a share of `learning_rate`."""
        if step < self.warmup_steps:
            first = FIRST_LEARNING_RATE / self.learning_rate
            return first + (1.0 - first) * step / self.warmup_steps
        return math.sqrt(self.warmup_steps / step)


class MoATrainer(RunMixin, Seq2SeqTrainer):
    """Trains a MoA model on batches that exist already; `train_dataset[i]` is the i-th batch of the run."""

    columns = ("loss", "task_loss", "auxiliary", *HEALTH)
    unit = "tokens"
    former_bf16 = True

    def __init__(
        self,
        model: MoAPreTrainedModel,
        config: MoATrainConfig,
        batches: RunBatches,
        tokens_per_batch: float,
        run: Path,
        **loss_settings: float,
    ) -> None:
        self.training, self.loss_settings = config, loss_settings
        self.keep_checkpoints, self.bf16 = config.average, config.bf16
        self.learning_rate_factor = config.factor
        arguments = training_arguments(
            run,
            Seq2SeqTrainingArguments,
            per_device_train_batch_size=1,  # of batches
            gradient_accumulation_steps=config.gradient_accumulation,
            max_steps=config.steps,
            max_grad_norm=config.max_grad_norm,
            save_steps=config.save_every,
            seed=config.seed,
            average_tokens_across_devices=True,
            **CHECKPOINTING if config.gradient_checkpointing else {},
        )
        batches.count = config.steps * config.gradient_accumulation * arguments.world_size
        self.units_per_step = round(tokens_per_batch * config.gradient_accumulation * arguments.world_size)
        super().__init__(model=model, args=arguments, train_dataset=batches, data_collator=only_one)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss, as this micro-batch's share of the step's mean; the auxiliary loss is in it, once."""
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch, output_routing=True, **self.loss_settings)
        share = step_share(inputs["labels"], num_items_in_batch)
        loss = outputs.loss
        auxiliary = 0.0 if outputs.auxiliary_loss is None else outputs.auxiliary_loss.detach() * share
        self.note(1.0, loss=loss.detach(), task_loss=loss.detach() - auxiliary)
        if outputs.auxiliary_loss is not None:
            self.note(1.0, auxiliary=auxiliary)
            self.note_routings(outputs.routing, share)
        # Each process has its share of the sum over all of them, and their gradients are averaged.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Adam as published, without weight decay."""
        if self.optimizer is None:
            parameters = [p for p in (self.model if model is None else model).parameters() if p.requires_grad]
            fused = self.args.device.type in ("cpu", "cuda")
            rate = self.training.learning_rate
            self.optimizer = torch.optim.Adam(parameters, lr=rate, betas=BETAS, eps=EPSILON, fused=fused)
        return self.optimizer

    def save_averaged(self, tokenizer: PreTrainedTokenizerBase) -> Path:
        """Writes the mean of the last checkpoints, with the vocabulary, and returns the folder."""
        model, folder = self.base_model, self.run_folder / "model"
        if self.accelerator.is_main_process:
            load_average(model, checkpoints(self.run_folder)[-self.training.average :])

            def write(partial: Path) -> None:
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)

            write_folder(folder, write)
        self.accelerator.wait_for_everyone()
        return folder


def only_one(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The batch in a list of one batch."""
    [batch] = batches
    return batch


def load_average(model: nn.Module, folders: list[Path]) -> None:
    """Loads the mean of the weights of several checkpoints.

    Raises:
        MixheadError: where there is none.
    """
    if not folders:
        raise MixheadError("There is no checkpoint to average.")
    total: dict[str, Tensor] = {}
    for folder in folders:
        for name, tensor in load_file(folder / "model.safetensors").items():
            total[name] = tensor.double() / len(folders) + total.get(name, 0.0)
    model.load_state_dict(total, strict=False)  # tied weights are stored once


def model_config(
    cls: type[MoATransformerConfig] | type[MoAEncoderConfig], settings: Mapping[str, Any], vocabulary: int
) -> MoAConfig:
    """The configuration that a recipe's `model` describes.

    Raises:
        MixheadError: where a key is unknown.
    """
    settings = dict(settings)
    known = {field.name for field in fields(cls)}
    unknown = [name for name in settings if name not in known | {"name"}]
    if unknown:
        raise MixheadError(f"The recipe has an unknown key model.{unknown[0]}: {cls.__name__} has no such field.")
    name = settings.pop("name", None)
    if name is None:
        return cls(vocab_size=vocabulary, **settings)
    if not issubclass(cls, MoATransformerConfig):
        raise MixheadError(f"{cls.__name__} has no named configurations: leave out model.name.")
    return partial(cls.named, name)(vocab_size=vocabulary, **settings)
