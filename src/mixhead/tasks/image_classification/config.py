"""`ImageTrainConfig`: how a classifier of images is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from mixhead.data.augment import AugmentConfig
from mixhead.data.labelled_images import NAMED
from mixhead.errors import MixheadError
from mixhead.settings import Count, NotNegative, Positive, Share, Source, absolute
from mixhead.training.config import RunConfig, Schedule


@dataclass(frozen=True, kw_only=True)
class ImageTrainConfig(RunConfig):
    """How a classifier of images is trained; see `RunConfig` for what is not listed here.

    Biases, norms and what the model exempts do not decay.

    Attributes:
        model: `name` of a published configuration, and fields of `MoHTransNeXtConfig` that differ from it (without a
            name: from the defaults). Or `folder` alone: a saved classifier to go on with, converted or not.
        teacher: folder of the dense model that the one of `model.folder` was converted from. Its final hidden states
            are then kept, and the labels are not used. None: the labels are learned.
        data: "fashion-mnist", a folder of images, or a Hugging Face dataset on disk; see `open_images`.
        epochs: rounds through the data; may be a fraction.
        batch_size: images in one forward pass of one process.
        augmentation: how images are changed.
        repeated_augmentation: how often in a row each image is read.
        crop_share: in evaluation, the side of the crop as a share of the image's shorter side.
        unreadable: "refuse" reads all images before the first step and refuses where one cannot be read; "skip" reads
            another image in its place, and says so.
        fsdp: shards weights, gradients and optimizer over the processes (FSDP2) instead of copying them (DDP).
        save_every: epochs between checkpoints; may be a fraction.
        evaluate_every: epochs between measurements on the test images, each at a checkpoint, written to
            `evaluations.csv`; 0 measures at the end alone. Nothing is chosen by them: the model is that of the last
            step.
    """

    model: Mapping[str, Any]
    data: Annotated[str, Source(NAMED)]
    teacher: Annotated[str | None, Source()] = None
    epochs: Positive = 300
    batch_size: Count = 128
    learning_rate: Positive = 1e-3
    schedule: Schedule = "timm_cosine"
    warmup: Share = 5 / 300
    warmup_learning_rate: NotNegative = 1e-6
    final_learning_rate: NotNegative = 1e-5
    weight_decay: NotNegative = 0.05
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    augmentation: AugmentConfig = field(default_factory=AugmentConfig)
    repeated_augmentation: Count = 3
    crop_share: Annotated[float, Gt(0), Le(1)] = 0.875
    unreadable: Literal["refuse", "skip"] = "refuse"
    fsdp: bool = False
    save_every: Positive = 1
    evaluate_every: NotNegative = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if "folder" in self.model:
            object.__setattr__(self, "model", {**self.model, "folder": absolute(self.model["folder"])})
        if self.evaluate_every and (self.fsdp or round(self.evaluate_every / self.save_every, 6) % 1):
            raise MixheadError(
                f"evaluate_every={self.evaluate_every} must be a multiple of save_every={self.save_every}: the model "
                "is measured at checkpoints. With fsdp it must be 0."
            )
