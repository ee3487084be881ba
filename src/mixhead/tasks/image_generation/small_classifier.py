"""A small convolutional classifier: its features compare generated images with real ones where there is no better.

Shape legend: N images, C channels, Y rows, X columns, F features, K classes, M images of a data set.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate
from transformers import Trainer, set_seed

from mixhead.data.noised_images import generation_images, pixel_inputs
from mixhead.errors import MixheadError
from mixhead.files import write_folder, write_text
from mixhead.training.recipes import Recipe, settings_from
from mixhead.training.run import open_run, run_training
from mixhead.training.trainer import RunMixin, TrainingResult, training_arguments


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
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            model = cls(settings_from(SmallClassifierConfig, values))
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, ValueError, SafetensorError, RuntimeError) as error:
            raise MixheadError(f"{folder} holds no small classifier that can be read ({error}).") from error
        return model


@dataclass(frozen=True)
class ClassifierSettings:
    """The recipe of a run.

    Attributes:
        images: what is trained on, see `generation_images`; its test split measures the accuracy.
        size: side of the images in pixels.
        channels: 1 (grey) or 3 (colour).
        widths: channels after each convolution.
        epochs: passes over the images.
        batch_size: images of one optimizer step.
        learning_rate: of AdamW; falls linearly to 0.
        seed: of the weights and the order of the images.
    """

    images: str
    size: int
    channels: int
    widths: tuple[int, ...] = (16, 32, 64, 64)
    epochs: int = 2
    batch_size: int = 128
    learning_rate: float = 2e-3
    seed: int = 0


class ClassifierTrainer(RunMixin, Trainer):
    """Cross entropy, and the share of the images that are classified correctly."""

    columns = ("loss", "correct")
    unit = "images"

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        images, labels = inputs["images"], inputs["classes"]
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        self.note(self.equal_share, loss=loss, correct=(logits.argmax(1) == labels).float().mean())
        return (loss, logits) if return_outputs else loss


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch by names, as the Trainer moves it to a device."""
    images, classes = default_collate(samples)
    return {"images": images, "classes": classes}


def train(recipe: Recipe, run: Path, *, resume: bool = False) -> TrainingResult:
    """Trains by a recipe, see `ClassifierSettings`; Ctrl-C leaves a run that `resume` continues."""
    settings = settings_from(ClassifierSettings, recipe.values)
    images = pixel_inputs(generation_images(settings.images), settings.size, settings.channels)
    if images.kept_MCYX is None:
        raise MixheadError(f"{settings.images} does not fit into memory: take fewer or smaller images.")
    config = SmallClassifierConfig(
        settings.channels, settings.size, len(images.classes), settings.widths, settings.images
    )
    set_seed(settings.seed)
    model = SmallClassifier(config)
    steps = settings.epochs * len(images.labels_M) // settings.batch_size
    arguments = training_arguments(
        run,
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(100, steps // 10),
        save_steps=500,
        train_sampling_strategy="random",
        seed=settings.seed,
    )
    data = TensorDataset(images.kept_MCYX, images.labels_M)
    trainer = ClassifierTrainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
    trainer.units_per_step = settings.batch_size * arguments.world_size
    done = open_run(trainer, "run.json", {"task": recipe.task, **recipe.values}, resume)
    seconds = run_training(trainer, done, "Training")
    model.sizes = replace(config, accuracy=accuracy(model.eval(), settings))
    write_folder(run / "model", model.save)
    return TrainingResult(run / "model", {"accuracy": model.sizes.accuracy, "seconds": seconds})


@torch.inference_mode()
def accuracy(model: SmallClassifier, settings: ClassifierSettings) -> float:
    """Share of the test images that are classified correctly."""
    test = pixel_inputs(generation_images(settings.images, "test"), settings.size, settings.channels)
    assert test.kept_MCYX is not None
    batches = zip(test.kept_MCYX.split(500), test.labels_M.split(500), strict=True)
    device = next(model.parameters()).device
    correct = sum(int((model(x.to(device)).argmax(1).cpu() == y).sum()) for x, y in batches)
    return correct / len(test.labels_M)
