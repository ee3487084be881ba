"""What a generator of images is trained on: pixels in memory or read from files, and the noise of every sample.

Shape legend: M images, C channels, Y rows, X columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mixhead.data.labelled_images import LabelledImages
from mixhead.data.order import SEED_STRIDE, ShuffledRounds
from mixhead.errors import MixheadError

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB"}
IN_MEMORY = 2**31  # bytes of pixels that are kept; more are read from their files again and again


class TrainingInputs(Protocol):
    """What a diffusion model is trained on: images, or their latents, with one class each."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        ...

    @property
    def labels_M(self) -> Tensor:
        """The class of every image, int64."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, Y, X) of one input."""
        ...

    @property
    def mirrors(self) -> bool:
        """Whether half of the samples shall be mirrored."""
        ...

    def read(self, index: int, mirrored: bool, generator: torch.Generator) -> Tensor:
        """One input, float32 [C, Y, X]."""
        ...


@dataclass(frozen=True, eq=False)
class PixelInputs:
    """Images as pixels in [-1, 1].

    Attributes:
        images: where they come from.
        size: their side; what is larger is scaled and cut to its centre.
        channels: 1 (grey) or 3.
        mirrors: whether half of the samples shall be mirrored.
        kept_MCYX: all of them as uint8, or None where they are too many.
    """

    images: LabelledImages
    size: int
    channels: int
    mirrors: bool = False
    kept_MCYX: Tensor | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.images.classes

    @property
    def labels_M(self) -> Tensor:
        return torch.from_numpy(self.images.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    def read(self, index: int, mirrored: bool, generator: torch.Generator) -> Tensor:
        del generator
        return to_signed(self.eight_bits(index).flip(-1) if mirrored else self.eight_bits(index))

    def eight_bits(self, index: int) -> Tensor:
        """One image, uint8 [C, Y, X]."""
        if self.kept_MCYX is not None:
            return self.kept_MCYX[index]
        return square(self.images.read(index), self.size, self.channels)


def pixel_inputs(images: LabelledImages, size: int, channels: int, mirrors: bool = False) -> PixelInputs:
    """Images to train on; kept in memory where they take less than 2 GiB."""
    if channels not in MODES:
        raise MixheadError(f"channels={channels} must be 1 (grey) or 3 (colour).")
    inputs = PixelInputs(images, size, channels, mirrors)
    count = len(images.labels)
    if count * channels * size * size > IN_MEMORY:
        return inputs
    kept = torch.empty(count, channels, size, size, dtype=torch.uint8)
    for index in range(count):
        kept[index] = inputs.eight_bits(index)
    return replace(inputs, kept_MCYX=kept)


def image_tensors(images: LabelledImages, size: int, channels: int, batch: int = 50) -> Iterator[Tensor]:
    """All images in their order, uint8 [B, C, Y, X], read one batch at a time."""
    inputs = PixelInputs(images, size, channels)
    for start in range(0, len(images.labels), batch):
        yield torch.stack([inputs.eight_bits(index) for index in range(start, min(start + batch, len(images.labels)))])


def square(image: Image, size: int, channels: int) -> Tensor:
    """The centre of an image at another size, uint8 [C, Y, X].

    The image is halved, averaging, until it is less than twice as large, then scaled bicubically: the preparation of
    the published models.
    """
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size)).convert(MODES[channels])
    return torch.from_numpy(np.array(image)).view(size, size, channels).permute(2, 0, 1)


def to_signed(pixels: Tensor) -> Tensor:
    """8 bits to [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_eight_bits(images: Tensor) -> Tensor:
    """[-1, 1] to 8 bits, rounded to the nearest."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class NoisingConfig:
    """How an image becomes a training sample.

    Attributes:
        steps: diffusion steps to choose from.
        class_dropout: share of the samples whose class is replaced by the null class.
        seed: of all of it.
    """

    steps: int
    class_dropout: float
    seed: int


class NoisedOrder(Dataset[dict[str, Tensor]]):
    """All samples that a run reads, in order: the images in random order, round after round, each with its noise.

    What a sample holds depends on nothing but the seed and its number, so a run that was interrupted, or has another
    number of processes, continues with the same ones.

    Args:
        inputs: the images.
        length: samples of the whole run.
        config: what is drawn for each of them.
    """

    def __init__(self, inputs: TrainingInputs, length: int, config: NoisingConfig) -> None:
        self.inputs, self.length, self.config = inputs, length, config
        self._labels_M = inputs.labels_M
        self.images = ShuffledRounds(len(self._labels_M), config.seed * SEED_STRIDE**2)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        config = self.config
        index = self.images[number]
        generator = torch.Generator().manual_seed(config.seed * SEED_STRIDE**2 + SEED_STRIDE + number)
        mirrored, dropped = torch.rand(2, generator=generator) < torch.tensor([0.5, config.class_dropout])
        image = self.inputs.read(index, self.inputs.mirrors and bool(mirrored), generator)
        return {
            "image": image,
            "noise": torch.randn(image.shape, generator=generator),
            "t": torch.randint(config.steps, (), generator=generator),
            "y": torch.tensor(len(self.inputs.classes)) if dropped else self._labels_M[index],
        }
