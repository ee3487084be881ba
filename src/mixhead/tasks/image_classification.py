"""Image classification: a MoH-ViT, or any converted model, trained on a folder of images, a dataset, or Fashion-MNIST.

The defaults are the published MoH-ViT recipe (arXiv 2410.11842, appendix B.1). Several processes, also on several
machines: start `mixhead` with `torchrun`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedModel, set_seed
from transformers.image_processing_base import ImageProcessingMixin

from mixhead.errors import MixheadError
from mixhead.models.hugging_face import MoHModelMixin, RoutingTrace
from mixhead.models.moh_vit import MoHTransNeXtConfig, MoHTransNeXtForImageClassification, image_processor
from mixhead.routing import Routing
from mixhead.tasks.augment import AugmentConfig
from mixhead.tasks.checkpoints import write_folder
from mixhead.tasks.evaluate_images import evaluate_images, load_classifier
from mixhead.tasks.image_batches import ImageOrder, MixingCollator, TrainTransform, refuse_unreadable
from mixhead.tasks.image_data import LabelledImages, open_both
from mixhead.tasks.recipes import Recipe, settings_from
from mixhead.tasks.run import open_run, run_training
from mixhead.tasks.training import HEALTH, RunMixin, TrainingResult, training_arguments

# Not reentrant: that form runs the routers without gradients, and the balance loss would be lost.
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


@dataclass(frozen=True)
class ImageTrainConfig:
    """How a classifier of images is trained.

    Attributes:
        model: `name` of a published configuration, and fields of `MoHTransNeXtConfig` that differ from it (without a
            name: from the defaults). Or `folder` alone: a saved classifier to go on with, converted or not.
        data: "fashion-mnist", a folder of images, or a Hugging Face dataset on disk; see `open_images`.
        epochs: rounds through the data; may be a fraction.
        batch_size: images in one forward pass of one process.
        gradient_accumulation: forward passes of one process in one optimizer step.
        learning_rate: the highest, after the warm-up.
        warmup_learning_rate: the one of the first step.
        final_learning_rate: the one of the last step.
        warmup_epochs: in which the learning rate rises linearly. The cosine by which it falls spans all epochs.
        weight_decay: of AdamW; biases, norms and what the model exempts have none.
        max_grad_norm: gradients are scaled down to this norm.
        augmentation: how images are changed.
        repeated_augmentation: how often in a row each image is read.
        crop_share: in evaluation, the side of the crop as a share of the image's shorter side.
        unreadable: "refuse" reads all images before the first step and refuses where one cannot be read; "skip" reads
            another image in its place, and says so.
        bf16: whether forward passes run under autocast to bfloat16.
        gradient_checkpointing: keeps one activation per block and computes the rest again.
        fsdp: shards weights, gradients and optimizer over the processes (FSDP2) instead of copying them (DDP).
        dataloader_workers: processes that read images, for each training process.
        seed: of weights, order and changes.
        save_every: epochs between checkpoints; may be a fraction.
        keep_checkpoints: how many of the newest checkpoints stay.
    """

    model: Mapping[str, Any]
    data: str
    epochs: float = 300
    batch_size: int = 128
    gradient_accumulation: int = 1
    learning_rate: float = 1e-3
    warmup_learning_rate: float = 1e-6
    final_learning_rate: float = 1e-5
    warmup_epochs: float = 5
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    augmentation: AugmentConfig = field(default_factory=AugmentConfig)
    repeated_augmentation: int = 3
    crop_share: float = 0.875
    unreadable: Literal["refuse", "skip"] = "refuse"
    bf16: bool = True
    gradient_checkpointing: bool = False
    fsdp: bool = False
    dataloader_workers: int = 0
    seed: int = 0
    save_every: float = 1
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation", "repeated_augmentation", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise MixheadError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("epochs", "save_every", "learning_rate", "max_grad_norm", "crop_share"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise MixheadError(f"{name}={getattr(self, name)} must be a positive number.")
        for name in ("warmup_epochs", "weight_decay", "dataloader_workers", "seed"):
            if getattr(self, name) < 0:
                raise MixheadError(f"{name}={getattr(self, name)} must not be negative.")
        for name in ("warmup_learning_rate", "final_learning_rate"):
            if not 0.0 <= getattr(self, name) <= self.learning_rate:
                raise MixheadError(f"{name}={getattr(self, name)} must lie between 0 and learning_rate.")
        if self.warmup_epochs >= self.epochs:
            raise MixheadError(f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs}.")
        if self.crop_share > 1.0:
            raise MixheadError(f"crop_share={self.crop_share} is a share and must be at most 1.")

    def factor(self, step: int, steps: int) -> float:
        """The learning rate of a step (counted from 0) as a share of `learning_rate`."""
        warmup = self.warmup_epochs / self.epochs * steps
        if step < warmup:
            first = self.warmup_learning_rate / self.learning_rate
            return first + (1.0 - first) * step / warmup
        last = self.final_learning_rate / self.learning_rate
        return last + (1.0 - last) * 0.5 * (1.0 + math.cos(math.pi * step / max(steps - 1, 1)))


def train(recipe: Recipe, run: Path, *, resume: bool = False) -> TrainingResult:
    """Trains what the recipe says and measures it on the test images.

    Args:
        recipe: with the settings of `ImageTrainConfig`.
        run: folder of the run.
        resume: continues the run in that folder.

    Raises:
        MixheadError: where settings or data cannot be used, the loss becomes NaN, or the disk is full.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint.
    """
    config = settings_from(ImageTrainConfig, recipe.values)
    train_images, test_images = open_both(config.data)
    if config.unreadable == "refuse":
        for images in (train_images, test_images):
            refuse_unreadable(images)
    set_seed(config.seed)
    model, processor = starting_model(config, train_images.classes)
    trainer = ImageTrainer(model, processor, config, train_images, run)
    passport = {"recipe": recipe.name, "task": recipe.task, **recipe.values}
    done = open_run(trainer, "recipe.json", passport, resume)
    seconds = run_training(trainer, done)
    folder = save_model(trainer, processor)
    metrics: dict[str, float | int | str] = {"training images": trainer.args.max_steps * trainer.units_per_step}
    metrics["training seconds"] = round(seconds, 1)
    if trainer.accelerator.is_main_process:
        metrics |= measured(folder, test_images, config.bf16)
    trainer.accelerator.wait_for_everyone()
    return TrainingResult(folder, metrics)


def measured(folder: Path, images: LabelledImages, bf16: bool) -> dict[str, float | int | str]:
    """Accuracy of the saved model."""
    model, processor, _classes = load_classifier(folder)
    result = evaluate_images(model, processor, images, 256, autocast=torch.bfloat16 if bf16 else None)
    return {
        "test images": result.images,
        "top-1 (%)": 100 * result.top1_accuracy,
        "top-5 (%)": 100 * result.top5_accuracy,
        "heads used (%)": 100 * result.active_share,
    }


def starting_model(config: ImageTrainConfig, classes: tuple[str, ...]) -> tuple[PreTrainedModel, ImageProcessingMixin]:
    """The model before the first step, and how images are prepared for it.

    Raises:
        MixheadError: where the settings of the model are unknown, or a saved one knows other classes.
    """
    settings = dict(config.model)
    if "folder" in settings:
        if len(settings) > 1:
            raise MixheadError("model.folder is a whole model: leave out all other settings of the model.")
        model, processor, known = load_classifier(settings["folder"])
        if known != classes:
            raise MixheadError(
                f"The model in {settings['folder']} knows other classes than the data, or in another order."
            )
        return model, processor
    known_fields = {f.name for f in fields(MoHTransNeXtConfig)}  # type: ignore[arg-type]
    unknown = [name for name in settings if name not in known_fields | {"name"}]
    if unknown:
        raise MixheadError(f"The recipe has an unknown key model.{unknown[0]}: MoHTransNeXtConfig has no such field.")
    labels = {
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
    }
    name = settings.pop("name", None)
    make = MoHTransNeXtConfig if name is None else partial(MoHTransNeXtConfig.named, name)
    sizes = make(**settings, **labels)
    return MoHTransNeXtForImageClassification(sizes), image_processor(sizes, config.crop_share)


class ImageTrainer(RunMixin):
    """Cross entropy with soft targets, and the balance loss of the routers."""

    columns = ("loss", "cross_entropy", *HEALTH)
    unit = "images"

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ImageProcessingMixin,
        config: ImageTrainConfig,
        images: LabelledImages,
        run: Path,
    ) -> None:
        self.training = config
        self.keep_checkpoints, self.bf16_autocast = config.keep_checkpoints, config.bf16
        arguments = training_arguments(
            run,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            max_steps=1,  # set below: it depends on the number of processes, which these arguments find out
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            dataloader_num_workers=config.dataloader_workers,
            **CHECKPOINTING if config.gradient_checkpointing else {},
            **sharding(model) if config.fsdp else {},
        )
        per_step = config.batch_size * config.gradient_accumulation * arguments.world_size
        steps_per_epoch = len(images.labels) / per_step
        self.units_per_step = per_step
        arguments.max_steps = int(config.epochs * steps_per_epoch)
        if arguments.max_steps == 0:
            raise MixheadError(
                f"epochs={config.epochs} of {len(images.labels):,} images do not reach for one optimizer step, which "
                f"reads {per_step:,}."
            )
        arguments.save_steps = max(round(config.save_every * steps_per_epoch), 1)
        transform = TrainTransform(
            size=image_side(processor),
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
            augmentation=config.augmentation,
        )
        order = ImageOrder(images, transform, arguments.max_steps * per_step, config.seed, config.repeated_augmentation)
        collator = MixingCollator(len(images.classes), config.augmentation, config.seed)
        super().__init__(model=model, args=arguments, train_dataset=order, data_collator=collator)
        # The loss below is a mean over the micro-batch, whatever the model would take: the Trainer divides it.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over the micro-batch of the cross entropy, and the balance loss times its coefficient."""
        del num_items_in_batch
        outputs, routings, coefficient = self.routed(model, inputs["pixel_values"])
        cross_entropy = F.cross_entropy(outputs.logits.float(), inputs["targets"])
        loss = cross_entropy
        balances = [routing.balance_loss for routing in routings if routing.probs_BNH is not None]
        if balances:
            loss = loss + coefficient * torch.stack(balances).mean()
            self.note_routings(routings, self.equal_share)
        self.note(self.equal_share, loss=loss, cross_entropy=cross_entropy)
        return (loss, outputs) if return_outputs else loss

    def routed(self, model: nn.Module, pixels_BCYX: Tensor) -> tuple[Any, list[Routing], float]:
        """The output of the model, the routings of its layers, and the weight of their balance loss."""
        if isinstance(self.base_model, MoHTransNeXtForImageClassification):
            outputs = model(pixel_values=pixels_BCYX, output_routing=True)
            return outputs, list(outputs.routing), self.base_model.config.balance_coefficient
        if isinstance(self.base_model, MoHModelMixin):
            trace = RoutingTrace()
            outputs = model(pixel_values=pixels_BCYX, routing_trace=trace)
            coefficient = self.base_model.config.moh["balance_coefficient"]
            return outputs, [routing for _, routing in trace.layers], coefficient
        return model(pixel_values=pixels_BCYX), [], 0.0

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The images in the order of `ImageOrder`."""
        assert isinstance(self.train_dataset, ImageOrder)
        loader = DataLoader(
            self.train_dataset,
            self.training.batch_size,
            sampler=SequentialSampler(self.train_dataset),
            collate_fn=self.data_collator,
            num_workers=self.training.dataloader_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.training.dataloader_workers > 0,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; what the model exempts, or else all biases and norms, has no weight decay."""
        if self.optimizer is not None:
            return self.optimizer
        exempt = self.base_model.no_weight_decay() if hasattr(self.base_model, "no_weight_decay") else set()
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in (self.model if model is None else model).named_parameters():
            if parameter.requires_grad:
                plain = name.removeprefix("module.")
                groups[parameter.dim() > 1 and plain not in exempt].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": self.training.weight_decay},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            lr=self.training.learning_rate,
            fused=self.args.device.type in ("cpu", "cuda"),
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rates by `ImageTrainConfig.factor`."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.create_optimizer() if optimizer is None else optimizer,
                lambda step: self.training.factor(step, num_training_steps),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler


def sharding(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of the Trainer that shard the model, one part for each of its blocks."""
    blocks = list(model._no_split_modules or ())
    return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": blocks}}


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


def save_model(trainer: ImageTrainer, processor: ImageProcessingMixin) -> Path:
    """Writes the trained model and its image processor, whole or not at all."""
    folder = trainer.run_folder / "model"
    state = trainer.accelerator.get_state_dict(trainer.model)

    def write(partial_folder: Path) -> None:
        trainer.base_model.save_pretrained(partial_folder, state_dict=state)
        processor.save_pretrained(partial_folder)

    if trainer.accelerator.is_main_process:
        write_folder(folder, write)
    trainer.accelerator.wait_for_everyone()
    return folder
