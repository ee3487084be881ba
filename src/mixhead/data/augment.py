"""Augmentation of images in training: random crops, RandAugment, random erasing, mixup and cutmix.

Written with Pillow, which has the operations that RandAugment is made of. Every function takes its own random
generator: what happens to an image depends on the seed and its place in the run, not on worker processes or resuming.

Shape legend: B batch, C channels, Y rows, X columns, L labels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.settings import Natural, NotNegative, Probability, Settings, Share

with contextlib.suppress(ImportError):  # what reads the images says that Pillow is missing; text needs none
    from PIL import Image, ImageEnhance, ImageOps

Rng = np.random.Generator
ATTEMPTS = 10  # to place a random rectangle
GREY = (124, 116, 104)  # ImageNet's mean: what comes into view where an image is moved


@dataclass(frozen=True)
class AugmentConfig(Settings):
    """How training images are changed; the defaults are those of the published MoH-ViT recipe.

    Attributes:
        crop_scale: smallest and largest share of an image's area that is cropped.
        crop_aspect: smallest and largest ratio of the crop's width to its height.
        flip: probability of mirroring.
        randaugment_magnitude: strength of RandAugment (arXiv 1909.13719) on a scale of 10, in its form in which a
            higher magnitude always changes more; 0 leaves it out.
        randaugment_deviation: standard deviation of that strength from one image to the next.
        randaugment_operations: operations that are drawn for each image; each takes place with probability 0.5.
        color_jitter: range of brightness, contrast and saturation, 1 - j to 1 + j. As in the published training it
            takes place only where RandAugment is left out, which changes the same things.
        erasing: probability that a random rectangle becomes noise (arXiv 1708.04896).
        mixup: alpha of the Beta distribution of mixup (arXiv 1710.09412); 0 leaves it out.
        cutmix: the same of cutmix (arXiv 1905.04899). Where both are on, one of them is drawn for each batch.
        mix: probability that a batch is mixed at all.
        label_smoothing: share of the target that is spread over all classes.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Probability = 0.5
    randaugment_magnitude: Annotated[float, Ge(0), Le(10)] = 9.0
    randaugment_deviation: NotNegative = 0.5
    randaugment_operations: Natural = 2
    color_jitter: Share = 0.4
    erasing: Probability = 0.25
    mixup: NotNegative = 0.8
    cutmix: NotNegative = 1.0
    mix: Probability = 1.0
    label_smoothing: Share = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("crop_scale", 1.0), ("crop_aspect", math.inf)):
            low, high = getattr(self, name)
            if not 0.0 < low <= high <= most:
                raise MixheadError(f"{name}=({low}, {high}) must be two positive numbers, the smaller first.")


# One image


def augment(image: Image.Image, size: int, config: AugmentConfig, rng: Rng) -> Image.Image:
    """A random crop of `size` x `size` pixels, perhaps mirrored, its colours and geometry changed."""
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=crop_box(image.size, config, rng))
    if rng.random() < config.flip:
        image = ImageOps.mirror(image)
    if config.randaugment_magnitude > 0.0:
        return randaugment(image, config, rng)
    return jitter(image, config.color_jitter, rng) if config.color_jitter > 0.0 else image


def crop_box(size: tuple[int, int], config: AugmentConfig, rng: Rng) -> tuple[int, int, int, int]:
    """Left, upper, right and lower edge of a random crop of an image of `size` (width, height)."""
    width, height = size
    for _ in range(ATTEMPTS):
        area = width * height * rng.uniform(*config.crop_scale)
        aspect = math.exp(rng.uniform(*np.log(config.crop_aspect)))
        columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            left, upper = int(rng.integers(width - columns + 1)), int(rng.integers(height - rows + 1))
            return left, upper, left + columns, upper + rows
    # The image is longer or higher than any crop may be: the largest allowed one in its middle.
    low, high = config.crop_aspect
    columns, rows = min(width, max(1, round(height * high))), min(height, max(1, round(width / low)))
    left, upper = (width - columns) // 2, (height - rows) // 2
    return left, upper, left + columns, upper + rows


def jitter(image: Image.Image, strength: float, rng: Rng) -> Image.Image:
    """Brightness, contrast and saturation by random factors, in random order."""
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for place in rng.permutation(len(kinds)):
        image = kinds[place](image).enhance(rng.uniform(1.0 - strength, 1.0 + strength))
    return image


def randaugment(image: Image.Image, config: AugmentConfig, rng: Rng) -> Image.Image:
    """A few random operations of random strength."""
    names = list(OPERATIONS)
    for _ in range(config.randaugment_operations):
        operation = OPERATIONS[names[rng.integers(len(names))]]
        if rng.random() < 0.5:
            magnitude = rng.normal(config.randaugment_magnitude, config.randaugment_deviation)
            level = min(max(magnitude, 0.0), 10.0) / 10.0
            image = operation(image, level, 1.0 if rng.random() < 0.5 else -1.0)
    return image


def moved(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """The image under an affine map from places in the result to places in the image."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=GREY)


def enhanced(aspect: str) -> Callable[[Image.Image, float, float], Image.Image]:
    """An operation that strengthens or weakens one aspect of an image."""
    return lambda image, level, sign: getattr(ImageEnhance, aspect)(image).enhance(max(1.0 + sign * 0.9 * level, 0.1))


# Each takes the image, a level in [0, 1] and a random sign; a higher level changes more.
OPERATIONS: dict[str, Callable[[Image.Image, float, float], Image.Image]] = {
    "auto_contrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
    "rotate": lambda image, level, sign: image.rotate(30.0 * level * sign, Image.Resampling.BICUBIC, fillcolor=GREY),
    "posterize": lambda image, level, sign: ImageOps.posterize(image, max(4 - int(4 * level), 1)),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - int(256 * level)),
    "solarize_add": lambda image, level, sign: image.point(
        [min(v + int(110 * level), 255) if v < 128 else v for v in range(256)] * len(image.getbands())
    ),
    "color": enhanced("Color"),
    "contrast": enhanced("Contrast"),
    "brightness": enhanced("Brightness"),
    "sharpness": enhanced("Sharpness"),
    "shear_x": lambda image, level, sign: moved(image, (1.0, 0.3 * level * sign, 0.0, 0.0, 1.0, 0.0)),
    "shear_y": lambda image, level, sign: moved(image, (1.0, 0.0, 0.0, 0.3 * level * sign, 1.0, 0.0)),
    "translate_x": lambda image, level, sign: moved(image, (1, 0, 0.45 * level * sign * image.width, 0, 1, 0)),
    "translate_y": lambda image, level, sign: moved(image, (1, 0, 0, 0, 1, 0.45 * level * sign * image.height)),
}


def erase(pixels_CYX: Tensor, probability: float, rng: Rng) -> Tensor:
    """With that probability, normal noise in a random rectangle of 2% to 33% of a normalised image."""
    if rng.random() >= probability:
        return pixels_CYX
    channels, rows, columns = pixels_CYX.shape
    for _ in range(ATTEMPTS):
        area = rows * columns * rng.uniform(0.02, 1 / 3)
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < height < rows and 0 < width < columns:
            y, x = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
            noise = rng.standard_normal((channels, height, width), dtype=np.float32)
            erased_CYX = pixels_CYX.clone()
            erased_CYX[:, y : y + height, x : x + width] = torch.from_numpy(noise)
            return erased_CYX
    return pixels_CYX


# A batch


def soft_targets(labels_B: Tensor, num_labels: int, smoothing: float) -> Tensor:
    """Class numbers [B] as probabilities [B, L]: `smoothing` is spread over all classes."""
    return F.one_hot(labels_B, num_labels) * (1.0 - smoothing) + smoothing / num_labels


def mix(pixels_BCYX: Tensor, targets_BL: Tensor, config: AugmentConfig, rng: Rng) -> tuple[Tensor, Tensor]:
    """Each image mixed with that in the same place from the end of the batch: mixup, cutmix, or neither.

    Args:
        pixels_BCYX: images.
        targets_BL: a probability of each class.
        config: how often and how strongly.
        rng: decides.

    Returns:
        Mixed images and targets.
    """
    kinds = [name for name in ("mixup", "cutmix") if getattr(config, name) > 0.0]
    if not kinds or rng.random() >= config.mix:
        return pixels_BCYX, targets_BL
    kind = kinds[rng.integers(len(kinds))]
    alpha = getattr(config, kind)
    share = float(rng.beta(alpha, alpha))
    partner_BCYX = pixels_BCYX.flip(0)
    if kind == "mixup":
        pixels_BCYX = share * pixels_BCYX + (1.0 - share) * partner_BCYX
    else:
        top, bottom, left, right = cut_box(pixels_BCYX.shape[-2:], share, rng)
        pixels_BCYX = pixels_BCYX.clone()
        pixels_BCYX[..., top:bottom, left:right] = partner_BCYX[..., top:bottom, left:right]
        share = 1.0 - (bottom - top) * (right - left) / pixels_BCYX[0, 0].numel()
    return pixels_BCYX, share * targets_BL + (1.0 - share) * targets_BL.flip(0)


def cut_box(size: tuple[int, ...], share: float, rng: Rng) -> tuple[int, int, int, int]:
    """First row, row behind the last, first and last column of what cutmix replaces; `share` of the image remains.

    The middle of the rectangle may be anywhere, so that some of it may lie outside and more remains.
    """
    edges = []
    for side in size:
        half = int(side * math.sqrt(1.0 - share)) // 2
        middle = int(rng.integers(side))
        edges += [max(middle - half, 0), min(middle + half, side)]
    return edges[0], edges[1], edges[2], edges[3]
