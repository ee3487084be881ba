"""What the trainings of MoA models share: their settings, their loss in the log, the mean of the last checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mixhead.data.token_batches import RunBatches
from mixhead.errors import MixheadError
from mixhead.models.moa import MoAConfig, MoAEncoderConfig, MoATransformerConfig
from mixhead.models.moa.modeling import MoAPreTrainedModel, step_share
from mixhead.settings import Count, Positive, Share, Source
from mixhead.training.checkpoints import check, checkpoints, read_weights
from mixhead.training.config import RunConfig, Schedule
from mixhead.training.health import HEALTH
from mixhead.training.optimizer import Group
from mixhead.training.recipes import refuse_unknown_fields
from mixhead.training.trainer import PartOfStep, RunTrainer, Samples


@dataclass(frozen=True, kw_only=True)
class MoATrainConfig(RunConfig):
    """How a MoA model, or a dense one of the same shape, is trained; the defaults are the published recipe.

    See `RunConfig` for what is not listed here.

    Attributes:
        model: `name` of a configuration, and fields that differ from it (without a name: from the defaults).
        vocabulary: size of a vocabulary to train on the training data, or the folder of one.
        steps: optimizer steps.
        average: the model is the mean of that many of the last checkpoints; at least so many are kept.
    """

    model: Mapping[str, Any]
    vocabulary: Annotated[int | str, Source()]
    steps: Count
    learning_rate: Positive = 7e-4
    schedule: Schedule = "inverse_sqrt"
    warmup: Share = 0.08
    max_grad_norm: Annotated[float, Ge(0)] = 0.0
    save_every: Count = 1000
    average: Count = 10


class MoATrainer(RunTrainer[MoATrainConfig]):
    """Trains a MoA model on batches that exist already.

    Args:
        model: with a loss of its own.
        config: how to train.
        batches: entry i is the i-th of the run.
        tokens_per_batch: on average.
        run: folder of the run.
        tokenizer: saved beside the model.
        **loss_settings: handed to the model with every batch.
    """

    columns = ("loss", "task_loss", "auxiliary", *HEALTH)
    unit = "tokens"
    adam: ClassVar[Mapping[str, Any]] = {"betas": (0.9, 0.98), "eps": 1e-9}  # as published

    def __init__(
        self,
        model: MoAPreTrainedModel,
        config: MoATrainConfig,
        batches: RunBatches,
        tokens_per_batch: float,
        run: Path,
        tokenizer: PreTrainedTokenizerBase,
        **loss_settings: float,
    ) -> None:
        self.batches, self.tokenizer, self.loss_settings = batches, tokenizer, loss_settings
        samples = Samples(batches.of_length, only_one, lambda per_step: config.steps, units=tokens_per_batch)
        kept = replace(config, keep_checkpoints=max(config.keep_checkpoints, config.average))
        super().__init__(model, kept, samples, run)

    def part_of_step(self, model: nn.Module, inputs: dict[str, Any], targets: Tensor | int | None) -> PartOfStep:
        """The model's own loss; the auxiliary loss is in it, once."""
        outputs = model(**inputs, num_items_in_batch=targets, output_routing=True, **self.loss_settings)
        share, loss = step_share(inputs["labels"], targets), outputs.loss
        if outputs.auxiliary_loss is None:
            return PartOfStep(loss, share, {"task_loss": loss})
        auxiliary = outputs.auxiliary_loss * share
        return PartOfStep(loss, share, {"task_loss": loss - auxiliary, "auxiliary": auxiliary}, outputs.routing)

    def group_of(self, name: str, parameter: nn.Parameter) -> Group:
        """All weights alike, as in fairseq, whose recipe this is."""
        del name, parameter
        return "decay"

    def write_model(self, folder: Path) -> None:
        """The mean of the last checkpoints, and the vocabulary."""
        load_average(self.base_model, checkpoints(self.run_folder)[-self.config.average :])
        self.base_model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def only_one(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The batch in a list of one batch."""
    [batch] = batches
    return batch


def load_average(model: nn.Module, folders: list[Path]) -> None:
    """Loads the mean of the weights of several checkpoints.

    Raises:
        MixheadError: where there is none, or one is damaged.
    """
    if not folders:
        raise MixheadError("There is no checkpoint to average.")
    total: dict[str, Tensor] = {}
    for folder in folders:
        check(folder)
        for name, tensor in read_weights(folder).items():
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
    name = settings.pop("name", None)
    refuse_unknown_fields(cls, settings)
    if name is None:
        return cls(vocab_size=vocabulary, **settings)
    if not issubclass(cls, MoATransformerConfig):
        raise MixheadError(f"{cls.__name__} has no named configurations: leave out model.name.")
    return partial(cls.named, name)(vocab_size=vocabulary, **settings)
