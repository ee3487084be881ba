"""The batches of a training run on images: which image stands where, how it is changed, what stands in for bad ones.

Everything random depends on the seed and on the place in the run alone, so that a run that is resumed, or has more
worker processes, sees the same images changed in the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from mixhead.data.augment import AugmentConfig, augment, erase, mix, soft_targets
from mixhead.data.labelled_images import LabelledImages
from mixhead.errors import MixheadError

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

Sample = tuple[int, Tensor, int]  # place in the run, pixels [C, Y, X], label


@dataclass(frozen=True)
class TrainTransform:
    """From an image to what the model sees of it in training.

    Attributes:
        size: side in pixels.
        mean, std: of each channel, of values in [0, 1].
        augmentation: the changes.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: AugmentConfig

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """float32 [3, size, size]."""
        pixels_YXC = torch.from_numpy(np.array(augment(image, self.size, self.augmentation, rng)))
        pixels_CYX = pixels_YXC.permute(2, 0, 1).float().div_(255.0)
        mean_C11, std_C11 = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return erase(pixels_CYX.sub_(mean_C11).div_(std_C11), self.augmentation.erasing, rng)


class ImageOrder(Dataset[Sample]):
    """All images that a run reads, in order: a random permutation of them, then the next.

    With repeated augmentation (arXiv 1902.05509) each image stands there several times in a row, changed differently,
    and a round ends when as many images were read as there are: it then saw a part of them only.

    Args:
        images: what to read.
        transform: makes tensors of them.
        length: how many are read in the whole run.
        seed: of the order and of all changes.
        repeats: how often in a row each image stands.
    """

    def __init__(
        self, images: LabelledImages, transform: TrainTransform, length: int, seed: int, repeats: int = 1
    ) -> None:
        self.images, self.transform, self.length = images, transform, length
        self.seed, self.repeats = seed, repeats
        self._round, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> Sample:
        number, offset = divmod(place, len(self.images.labels))
        if number != self._round:
            order = np.random.default_rng((self.seed, number)).permutation(len(self.images.labels))
            self._round, self._order = number, order.repeat(self.repeats)[: len(order)]
        index, image = self.readable(int(self._order[offset]))
        rng = np.random.default_rng((self.seed, number, offset))
        return place, self.transform(image, rng), int(self.images.labels[index])

    def readable(self, index: int) -> tuple[int, Image.Image]:
        """That image, or the next one that can be read in its place, with its number."""
        total = len(self.images.labels)
        for candidate in range(index, index + total):
            try:
                return candidate % total, self.images.read(candidate % total)
            except MixheadError as error:
                logger.warning("Another image is read instead: %s", error)
        raise MixheadError(f"None of the {total} images beside {self.images.name(index)} can be read.")


@dataclass(frozen=True)
class MixingCollator:
    """From samples to a batch, whose images are mixed and whose targets are soft.

    Attributes:
        num_labels: classes.
        augmentation: mixup, cutmix and label smoothing.
        seed: of the mixing.
    """

    num_labels: int
    augmentation: AugmentConfig
    seed: int

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """`pixel_values` [B, C, Y, X] and `targets` [B, L]."""
        places, pixels, labels = zip(*samples, strict=True)
        targets_BL = soft_targets(torch.tensor(labels), self.num_labels, self.augmentation.label_smoothing)
        # A second generator beside those of the images, which have three numbers.
        rng = np.random.default_rng((self.seed, places[0]))
        pixels_BCYX, targets_BL = mix(torch.stack(pixels), targets_BL, self.augmentation, rng)
        return {"pixel_values": pixels_BCYX, "targets": targets_BL}


def refuse_unreadable(images: LabelledImages) -> None:
    """Reads every image once, with a bar on a terminal.

    Raises:
        MixheadError: where any cannot be read; it names up to five of them.
    """
    total, bad, console = len(images.labels), [], Console(stderr=True)
    numbers = range(total)
    for index in track(numbers, "Reading every image", console=console, disable=not console.is_terminal):
        try:
            images.read(index)
        except MixheadError as error:
            bad.append(str(error))
    if bad:
        more = f" And {len(bad) - 5} more." if len(bad) > 5 else ""
        raise MixheadError(
            f"{len(bad)} of {total} images cannot be read: {' '.join(bad[:5])}{more} Mend or delete them, or leave "
            "such images out with unreadable=skip."
        )
