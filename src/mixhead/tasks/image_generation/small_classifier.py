"""A small convolutional classifier: its features compare generated images with real ones where there is no better.

Shape legend: N images, C channels, Y rows, X columns, F features, K classes, M images of a data set.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate
from transformers import set_seed

from mixhead.data.labelled_images import NAMED, open_images
from mixhead.data.noised_images import PixelInputs, pixel_inputs
from mixhead.errors import MixheadError
from mixhead.files import read_json, write_text
from mixhead.settings import Count, Positive, Share, Source
from mixhead.training.config import Precision, RunConfig, Schedule
from mixhead.training.recipes import settings_from
from mixhead.training.run import Metrics
from mixhead.training.trainer import PartOfStep, RunTrainer, Samples


@dataclass(frozen=True)
class SmallClassifierConfig:
    """Sizes of a small classifier, and what became of it.

    Attributes:
        channels: of the images.
        size: their side in pixels.
        classes: how many.
        widths: channels after each convolution; the first two halve the map.
        trained_on: name of the data.
        accuracy: share of the test images that it classified correctly.
    """

    channels: int
    size: int
    classes: int
    widths: tuple[int, ...]
    trained_on: str
    accuracy: float = 0.0


class SmallClassifier(nn.Module):
    """Convolutions with batch norm, their mean over the image, and a linear layer."""

    def __init__(self, config: SmallClassifierConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = config.channels
        for number, width in enumerate(config.widths):
            stride = 2 if number < 2 else 1
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.sizes = config
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(before, config.classes)

    def feature_map(self, images_NCYX: Tensor) -> Tensor:
        """Features at every place, [N, F, Y / 4, X / 4], of images with values from 0 to 255."""
        return self.body(images_NCYX.float() / 127.5 - 1)

    def forward(self, images_NCYX: Tensor) -> Tensor:
        return self.head(self.feature_map(images_NCYX).mean((2, 3)))

    def save(self, folder: Path) -> None:
        """Writes it into a folder, for `load`."""
        save_file(self.state_dict(), folder / "model.safetensors")
        write_text(folder / "config.json", json.dumps(asdict(self.sizes), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> SmallClassifier:
        """Reads what `save` wrote."""
        try:
            values = read_json(folder / "config.json")
            model = cls(settings_from(SmallClassifierConfig, values))
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, ValueError, SafetensorError, RuntimeError) as error:
            raise MixheadError(f"{folder} holds no small classifier that can be read ({error}).") from error
        return model


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(RunConfig):
    """How a small classifier is trained; see `RunConfig` for what is not listed here.

    Attributes:
        images: what is trained on, see `open_images`; its test split measures the accuracy.
        size: side of the images in pixels.
        channels: 1 (grey) or 3 (colour).
        widths: channels after each convolution.
        epochs: passes over the images.
        batch_size: images of one optimizer step.
    """

    images: Annotated[str, Source(NAMED)]
    size: Count
    channels: int
    widths: tuple[int, ...] = (16, 32, 64, 64)
    epochs: Count = 2
    batch_size: Count = 128
    learning_rate: Positive = 2e-3
    schedule: Schedule = "linear"
    warmup: Share = 0.1
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    precision: Precision = "float32"


class ClassifierTrainer(RunTrainer[ClassifierConfig]):
    """Cross entropy, and the share of the images that are classified correctly.

    Args:
        model: trained in place.
        config: how to train.
        inputs: images in memory.
        run: folder of the run.
    """

    columns = ("loss", "correct")
    unit = "images"

    def __init__(self, model: SmallClassifier, config: ClassifierConfig, inputs: PixelInputs, run: Path) -> None:
        assert inputs.kept_MCYX is not None
        self.classifier = model
        data = TensorDataset(inputs.kept_MCYX, inputs.labels_M)
        samples = Samples(
            dataset=lambda length: data,
            collate=collate,
            steps=lambda per_step: config.epochs * len(data) // per_step,
            batch_size=config.batch_size,
        )
        super().__init__(model, config, samples, run, train_sampling_strategy="random")

    def part_of_step(self, model: nn.Module, inputs: dict[str, Any], targets: Tensor | int | None) -> PartOfStep:
        """The cross entropy."""
        del targets
        images, labels = inputs["images"], inputs["classes"]
        logits, share = model(images), self.equal_share
        correct = (logits.argmax(1) == labels).float().mean() * share
        return PartOfStep(F.cross_entropy(logits, labels) * share, share, {"correct": correct})

    def write_model(self, folder: Path) -> None:
        """The classifier, with its accuracy."""
        model = self.classifier.eval()
        model.sizes = replace(model.sizes, accuracy=accuracy(model, self.config))
        model.save(folder)


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch by names, as the Trainer moves it to a device."""
    images, classes = default_collate(samples)
    return {"images": images, "classes": classes}


def build(config: ClassifierConfig, run: Path) -> ClassifierTrainer:
    """The trainer for a recipe.

    Raises:
        MixheadError: where the images do not fit into memory.
    """
    inputs = pixel_inputs(open_images(config.images), config.size, config.channels)
    if inputs.kept_MCYX is None:
        raise MixheadError(f"{config.images} does not fit into memory: take fewer or smaller images.")
    sizes = SmallClassifierConfig(config.channels, config.size, len(inputs.classes), config.widths, config.images)
    set_seed(config.seed)
    return ClassifierTrainer(SmallClassifier(sizes), config, inputs, run)


def measure(trainer: ClassifierTrainer, folder: Path) -> Metrics:
    """The accuracy on the test images."""
    del folder
    return {"accuracy": trainer.classifier.sizes.accuracy}


@torch.inference_mode()
def accuracy(model: SmallClassifier, config: ClassifierConfig) -> float:
    """Share of the test images that are classified correctly."""
    test = pixel_inputs(open_images(config.images, "test"), config.size, config.channels)
    assert test.kept_MCYX is not None
    batches = zip(test.kept_MCYX.split(500), test.labels_M.split(500), strict=True)
    device = next(model.parameters()).device
    correct = sum(int((model(x.to(device)).argmax(1).cpu() == y).sum()) for x, y in batches)
    return correct / len(test.labels_M)
