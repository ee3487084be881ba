"""Classification on the trainer of every run: the loss, what decays, the images and the measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.image_processing_base import ImageProcessingMixin

from mixhead.data.image_batches import ImageOrder, MixingCollator, TrainTransform
from mixhead.data.labelled_images import LabelledImages, part
from mixhead.errors import MixheadError
from mixhead.files import write_text
from mixhead.models.hugging_face import MoHModelMixin, RoutingTrace
from mixhead.models.moh_vit import MoHTransNeXtForImageClassification
from mixhead.routing import Routing
from mixhead.tasks.image_classification.config import ImageTrainConfig
from mixhead.tasks.image_classification.evaluate import evaluate_images
from mixhead.training.health import HEALTH
from mixhead.training.optimizer import Group
from mixhead.training.progress import read_rows
from mixhead.training.trainer import PartOfStep, RunTrainer, Samples


class ImageTrainer(RunTrainer[ImageTrainConfig]):
    """Cross entropy with soft targets, and the balance loss of the routers.

    Args:
        model: a classifier.
        processor: prepares images for it; saved beside it.
        config: how to train.
        images: to learn from.
        tests: to measure on.
        run: folder of the run.
    """

    columns = ("loss", "cross_entropy", *HEALTH)
    unit = "images"

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ImageProcessingMixin,
        config: ImageTrainConfig,
        images: LabelledImages,
        tests: LabelledImages,
        run: Path,
        **settings: Any,
    ) -> None:
        self.processor, self.tests = processor, tests
        self.exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
        self.state: dict[str, Tensor] | None = None
        transform = TrainTransform(
            size=image_side(processor),
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
            augmentation=config.augmentation,
        )
        samples = Samples(
            dataset=lambda length: ImageOrder(images, transform, length, config.seed, config.repeated_augmentation),
            collate=MixingCollator(len(images.classes), config.augmentation, config.seed),
            steps=lambda per_step: int(config.epochs * len(images.labels) / per_step),
            batch_size=config.batch_size,
        )
        super().__init__(model, config, samples, run, **{**(sharding(model) if config.fsdp else {}), **settings})
        epoch = len(images.labels) / self.units_per_step
        self.args.save_steps = max(round(config.save_every * epoch), 1)
        if config.evaluate_every:
            self.add_callback(Evaluations(self, tests))

    def part_of_step(self, model: nn.Module, inputs: dict[str, Any], targets: Tensor | int | None) -> PartOfStep:
        """The cross entropy."""
        del targets
        outputs, routings, coefficient = self.routed(model, inputs["pixel_values"])
        share = self.equal_share
        cross_entropy = F.cross_entropy(outputs.logits.float(), inputs["targets"]) * share
        return PartOfStep(cross_entropy, share, {"cross_entropy": cross_entropy}, routings, coefficient)

    def routed(self, model: nn.Module, pixels_BCYX: Tensor, **asked: Any) -> tuple[Any, list[Routing], float]:
        """The output of the model, the routings of its layers, and the weight of their balance loss."""
        if isinstance(self.base_model, MoHTransNeXtForImageClassification):
            outputs = model(pixel_values=pixels_BCYX, output_routing=True, **asked)
            return outputs, list(outputs.routing), self.base_model.config.balance_coefficient
        if isinstance(self.base_model, MoHModelMixin):
            trace = RoutingTrace()
            outputs = model(pixel_values=pixels_BCYX, routing_trace=trace, **asked)
            coefficient = self.base_model.config.moh["balance_coefficient"]
            return outputs, [routing for _, routing in trace.layers], coefficient
        return model(pixel_values=pixels_BCYX, **asked), [], 0.0

    def group_of(self, name: str, parameter: nn.Parameter) -> Group:
        """What the model exempts does not decay either."""
        return "keep" if name in self.exempt else super().group_of(name, parameter)

    def gather_weights(self) -> None:
        """Brings the parts of a sharded model together."""
        self.state = self.accelerator.get_state_dict(self.model)

    def write_model(self, folder: Path) -> None:
        """The model and its image processor."""
        self.base_model.save_pretrained(folder, state_dict=self.state)
        self.processor.save_pretrained(folder)


class Evaluations(TrainerCallback):
    """Measures the model at checkpoints, for `evaluations.csv`; every process looks at its part of the images.

    Args:
        trainer: whose model it is.
        images: to measure on.
    """

    def __init__(self, trainer: ImageTrainer, images: LabelledImages) -> None:
        accelerator = trainer.accelerator
        self.trainer = trainer
        self.images = part(images, accelerator.process_index, accelerator.num_processes)
        # In units of checkpoints: they are whole numbers of steps, epochs are not.
        self.every = round(trainer.config.evaluate_every / trainer.config.save_every)
        self.file = trainer.run_folder / "evaluations.csv"

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measures."""
        if state.global_step % (self.every * args.save_steps) == 0:
            self.measure(state.global_step)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Adds the row of the checkpoint that a run goes on from, where it was stopped before it had added that."""
        step = state.global_step
        known: list[bool | None] = [None]
        if self.trainer.accelerator.is_main_process:
            known = [step in {int(row["step"]) for row in read_rows(self.file)}]
        if step and step % (self.every * args.save_steps) == 0 and broadcast_object_list(known) == [False]:
            self.measure(step)

    def measure(self, step: int) -> None:
        """Adds the row of that step, behind those of earlier ones."""
        trainer = self.trainer
        autocast = torch.bfloat16 if trainer.bfloat16 else None
        result = evaluate_images(trainer.base_model, trainer.processor, self.images, 256, autocast=autocast)
        right = int(result.confusion_CL.diagonal().sum())
        counts = torch.tensor([result.images, right, result.top5], dtype=torch.float64, device=trainer.args.device)
        total, right, top5 = trainer.accelerator.reduce(counts, "sum").tolist()
        if trainer.accelerator.is_main_process:
            rows = [row for row in read_rows(self.file) if int(row["step"]) < step]
            row = {"step": step, "images": int(total), "top1": right / total, "top5": top5 / total}
            lines = [",".join(str(value) for value in r.values()) for r in (*rows, row)]
            write_text(self.file, "\n".join([",".join(row), *lines]) + "\n")


def sharding(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of the Trainer that shard the model, one part for each of its blocks; checkpoints hold it whole.

    Raises:
        MixheadError: on CPUs, where accelerate would copy the model to every process without a word.
    """
    if not torch.accelerator.is_available():
        raise MixheadError("fsdp=true needs GPUs: without them several processes train with copies (fsdp=false).")
    blocks = list(model._no_split_modules or ())
    config = {"version": 2, "transformer_layer_cls_to_wrap": blocks, "state_dict_type": "FULL_STATE_DICT"}
    return {"fsdp": True, "fsdp_config": config}


def image_side(processor: ImageProcessingMixin) -> int:
    """The side in pixels of what a processor hands to the model.

    Raises:
        MixheadError: where that is no square.
    """
    crops = getattr(processor, "do_center_crop", None)
    size = processor.crop_size if crops else processor.size
    height, width = size.get("height"), size.get("width")
    if height is None or height != width:
        raise MixheadError(f"The image processor makes images of {dict(size)}: training needs square ones.")
    return int(height)
