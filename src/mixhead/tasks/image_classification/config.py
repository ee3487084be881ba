"""`ImageTrainConfig`: how a classifier of images is trained. Impossible combinations are refused when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mixhead.data.augment import AugmentConfig
from mixhead.errors import MixheadError
from mixhead.precision import Bf16


@dataclass(frozen=True)
class ImageTrainConfig:
    """How a classifier of images is trained.

    Attributes:
        model: `name` of a published configuration, and fields of `MoHTransNeXtConfig` that differ from it (without a
            name: from the defaults). Or `folder` alone: a saved classifier to go on with, converted or not.
        teacher: folder of the dense model that the one of `model.folder` was converted from. Its final hidden states
            are then kept, and the labels are not used. None: the labels are learned.
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
        bf16: whether forward passes run under autocast to bfloat16; "auto" where the machine multiplies it faster.
        gradient_checkpointing: keeps one activation per block and computes the rest again.
        fsdp: shards weights, gradients and optimizer over the processes (FSDP2) instead of copying them (DDP).
        dataloader_workers: processes that read images, for each training process.
        seed: of weights, order and changes.
        save_every: epochs between checkpoints; may be a fraction.
        evaluate_every: epochs between measurements on the test images, each at a checkpoint, written to
            `evaluations.csv`; 0 measures at the end alone. Nothing is chosen by them: the model is that of the last
            step.
        keep_checkpoints: how many of the newest checkpoints stay.
    """

    model: Mapping[str, Any]
    data: str
    teacher: str | None = None
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
    bf16: Bf16 = "auto"
    gradient_checkpointing: bool = False
    fsdp: bool = False
    dataloader_workers: int = 0
    seed: int = 0
    save_every: float = 1
    evaluate_every: float = 10
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation", "repeated_augmentation", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise MixheadError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("epochs", "save_every", "learning_rate", "max_grad_norm", "crop_share"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise MixheadError(f"{name}={getattr(self, name)} must be a positive number.")
        for name in ("warmup_epochs", "weight_decay", "dataloader_workers", "seed", "evaluate_every"):
            if getattr(self, name) < 0:
                raise MixheadError(f"{name}={getattr(self, name)} must not be negative.")
        for name in ("warmup_learning_rate", "final_learning_rate"):
            if not 0.0 <= getattr(self, name) <= self.learning_rate:
                raise MixheadError(f"{name}={getattr(self, name)} must lie between 0 and learning_rate.")
        if self.warmup_epochs >= self.epochs:
            raise MixheadError(f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs}.")
        if self.evaluate_every and (self.fsdp or round(self.evaluate_every / self.save_every, 6) % 1):
            raise MixheadError(
                f"evaluate_every={self.evaluate_every} must be a multiple of save_every={self.save_every}: the model "
                "is measured at checkpoints. With fsdp it must be 0."
            )
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
