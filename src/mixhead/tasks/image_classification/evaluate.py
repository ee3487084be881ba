"""Image classifiers measured: accuracy, confusion, speed, and which heads the images of each class used.

Shape legend: B images of a batch, N tokens, H heads, L labels, C classes of the data.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from mixhead import store
from mixhead.data.labelled_images import LabelledImages
from mixhead.errors import MixheadError
from mixhead.models.moh_vit import MoHTransNeXtConfig, image_processor
from mixhead.modes import autocast_to, evaluation_mode
from mixhead.recording import keep_routing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ImageEvaluation:
    """What came out.

    Attributes:
        classes: names, in the order of the labels.
        confusion_CL: images by true class and by the class that the model took for the likeliest, int64.
        top5: images whose class is among the five likeliest.
        load: for each layer that routes, the share of the patches of a class that used each head: float32 [C, H], NaN
            for a class without images. The paper calls it density (arXiv 2410.11842, figure 3).
        competes: for each of these layers, which heads compete: bool [H]. The others are shared by all patches.
        heads: of all layers, also of those that do not route.
        seconds: wall time of everything, reading included.
        model_seconds: wall time of the model alone.
        unreadable: what could not be read and was left out.
    """

    classes: tuple[str, ...]
    confusion_CL: Tensor
    top5: int
    load: dict[str, Tensor]
    competes: dict[str, Tensor]
    heads: int
    seconds: float
    model_seconds: float
    unreadable: tuple[str, ...] = field(default=())

    @property
    def images(self) -> int:
        """How many images were classified."""
        return int(self.confusion_CL.sum())

    @property
    def top1_accuracy(self) -> float:
        """Share of the images whose class the model took for the likeliest."""
        return int(self.confusion_CL.diagonal().sum()) / self.images

    @property
    def top5_accuracy(self) -> float:
        """Share of the images whose class is among the five likeliest."""
        return self.top5 / self.images

    @property
    def active_share(self) -> float:
        """Share of the heads of all layers that an average patch used; layers that do not route use all of theirs."""
        images_C = self.confusion_CL.sum(1)
        unused = sum(float((1.0 - mean_load(load_CH, images_C)).sum()) for load_CH in self.load.values())
        routed = sum(load_CH.shape[1] for load_CH in self.load.values())
        return 1.0 - unused / max(self.heads, routed, 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "images": self.images,
            "top1": self.top1_accuracy,
            "top5": self.top5_accuracy,
            "active_share": self.active_share,
            "images_per_second": self.images / self.seconds,
            "model_images_per_second": self.images / self.model_seconds,
            "classes": list(self.classes),
            "confusion": self.confusion_CL.tolist(),
            "load": {name: rounded(load_CH) for name, load_CH in self.load.items()},
            "competes": {name: competes_H.tolist() for name, competes_H in self.competes.items()},
            "unreadable": list(self.unreadable),
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1)


def mean_load(load_CH: Tensor, images_C: Tensor) -> Tensor:
    """The load over all images, [H]."""
    return load_CH.nan_to_num().T @ images_C.float() / images_C.sum()


def rounded(load_CH: Tensor) -> list[list[float | None]]:
    """Numbers that JSON has: None for NaN."""
    return [[None if np.isnan(value) else round(value, 4) for value in row] for row in load_CH.tolist()]


class LoadByClass:
    """Adds up which heads the images of each class used."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.used: dict[str, Tensor] = {}
        self.competes: dict[str, Tensor] = {}

    def add(self, name: str, selected_BNH: Tensor, labels_B: Tensor) -> None:
        """One layer's selection for a batch."""
        share_BH = selected_BNH.float().mean(1)
        used_CH = self.used.setdefault(name, torch.zeros(self.num_classes, share_BH.shape[1]))
        used_CH.index_add_(0, labels_B, share_BH)
        unused_H = ~selected_BNH.flatten(0, 1).all(0)
        self.competes[name] = self.competes.get(name, torch.zeros_like(unused_H)) | unused_H

    def mean(self, images_C: Tensor) -> dict[str, Tensor]:
        """Share of the patches that used each head, by layer; NaN for classes without images."""
        return {name: used_CH / images_C.unsqueeze(1) for name, used_CH in self.used.items()}


@torch.no_grad()
def evaluate_images(
    model: PreTrainedModel,
    processor: ImageProcessingMixin,
    images: LabelledImages,
    batch_size: int = 64,
    *,
    autocast: torch.dtype | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ImageEvaluation:
    """Classifies every image. What cannot be read is left out, logged and listed in the result.

    Args:
        model: an image classifier of transformers, routed or not.
        processor: prepares images for it.
        images: with the class numbers of the model.
        batch_size: images at a time.
        autocast: dtype of the forward passes; None for the model's own.
        on_progress: called with (done, all).

    Raises:
        MixheadError: where no image could be read, or the model gives no logits.
    """
    start = time.perf_counter()
    model_seconds, top5 = 0.0, 0
    confusion_CL = torch.zeros(len(images.classes), len(images.classes), dtype=torch.int64)
    load = LoadByClass(len(images.classes))
    unreadable: list[str] = []
    with evaluation_mode(model):
        for pixels_BCYX, labels_B in batches(images, processor, batch_size, unreadable, on_progress):
            begin = time.perf_counter()
            with keep_routing(model) as log:
                logits_BL = logits_of(model, pixels_BCYX, autocast)
            model_seconds += time.perf_counter() - begin
            predicted_BK = logits_BL.topk(min(5, logits_BL.shape[-1])).indices
            confusion_CL.index_put_((labels_B, predicted_BK[:, 0]), torch.ones(len(labels_B), dtype=torch.int64), True)
            top5 += int((predicted_BK == labels_B.unsqueeze(1)).sum())
            for name, routing in log.layers:
                load.add(name, routing.selected_BNH, labels_B)
    images_C = confusion_CL.sum(1)
    return ImageEvaluation(
        classes=images.classes,
        confusion_CL=confusion_CL,
        top5=top5,
        load=load.mean(images_C),
        competes=load.competes,
        heads=heads_of(model),
        seconds=time.perf_counter() - start,
        model_seconds=model_seconds,
        unreadable=tuple(unreadable),
    )


def heads_of(model: PreTrainedModel) -> int:
    """The heads of all layers, whether they route or not; 0 where the configuration does not tell."""
    config = model.config
    heads = getattr(config, "num_attention_heads", getattr(config, "num_heads", 0))
    if isinstance(heads, int):
        return heads * getattr(config, "num_hidden_layers", 0)
    return sum(depth * number for depth, number in zip(config.depths, heads, strict=True))


def logits_of(model: PreTrainedModel, pixels_BCYX: Tensor, autocast: torch.dtype | None = None) -> Tensor:
    """What the model says of a batch, float32 on the CPU."""
    pixels_BCYX = pixels_BCYX.to(model.device, model.dtype)
    with autocast_to(autocast, model.device):
        return model(pixel_values=pixels_BCYX).logits.float().cpu()


def batches(
    images: LabelledImages,
    processor: ImageProcessingMixin,
    batch_size: int,
    unreadable: list[str],
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Prepared images [B, C, Y, X] and their labels [B]; what cannot be read goes into `unreadable` instead."""
    total = len(images.labels)
    for first in range(0, total, batch_size):
        read, labels = [], []
        for index in range(first, min(first + batch_size, total)):
            try:
                read.append(images.read(index))
            except MixheadError as error:
                logger.warning("Left out: %s", error)
                unreadable.append(images.name(index))
            else:
                labels.append(int(images.labels[index]))
        if read:
            yield processor(read, return_tensors="pt")["pixel_values"], torch.tensor(labels)
        if on_progress is not None:
            on_progress(min(first + batch_size, total), total)
    if len(unreadable) == total:
        raise MixheadError(f"None of the {total} images beside {images.name(0)} can be read.")


def load_classifier(path: str | Path) -> tuple[PreTrainedModel, ImageProcessingMixin, tuple[str, ...]]:
    """An image classifier from a folder, its image processor, and the names of its classes.

    Raises:
        MixheadError: where the folder holds no image classifier, or no image processor.
    """
    model = store.load(path)
    if not hasattr(model.config, "id2label") or not hasattr(model, "classifier"):
        raise MixheadError(f"{path} holds a {type(model).__name__}, which is no image classifier.")
    names = tuple(str(model.config.id2label[number]) for number in range(model.config.num_labels))
    return model.eval(), load_processor(Path(path), model), names


def load_processor(folder: Path, model: PreTrainedModel) -> ImageProcessingMixin:
    """The image processor saved beside a model; for MoH-ViT without one, that of the published models."""
    if not (folder / "preprocessor_config.json").is_file():
        if isinstance(model.config, MoHTransNeXtConfig):
            return image_processor(model.config)
        raise MixheadError(f"{folder} has no image processor (preprocessor_config.json): save one beside the model.")
    return store.or_refuse(
        lambda: AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
        f"The image processor in {folder} cannot be read",
    )
