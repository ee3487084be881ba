"""What converting a dense DiT needs of the outer world: images of its classes, in the form that it sees.

Shape legend: M images, C channels, Y rows, X columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixhead.data.labelled_images import LabelledImages
from mixhead.data.latents import encode
from mixhead.data.noised_images import PixelInputs, to_signed
from mixhead.errors import MixheadError
from mixhead.models.moh_dit import MoHDiTConfig

BATCH = 8


def calibration_samples(
    images: LabelledImages, config: MoHDiTConfig, vae: Any | None, count: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random images as the model sees them, [M, C, Y, X], and their classes, int64 [M].

    Args:
        images: of the classes that the model was trained on.
        config: of the model.
        vae: encodes them; None for a model of pixels.
        count: how many, at most.
        seed: of the choice.

    Raises:
        MixheadError: where images, model and VAE do not fit each other.
    """
    if len(images.classes) != config.num_classes:
        raise MixheadError(
            f"The images have {len(images.classes)} classes, but the model was trained on {config.num_classes}: "
            "calibrate on images of its own classes."
        )
    if vae is None and config.in_channels not in (1, 3):
        raise MixheadError(
            f"The model has {config.in_channels} channels, so it works on latents: name the folder of its VAE."
        )
    scale = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    inputs = PixelInputs(images, config.sample_size * scale, config.in_channels if vae is None else 3)
    chosen_M = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed))[:count]
    samples = []
    for part in chosen_M.split(BATCH):
        pixels = torch.stack([to_signed(inputs.eight_bits(index)) for index in part.tolist()])
        samples.append(
            pixels if vae is None else encode(vae, pixels).chunk(2, 1)[0].float() * vae.config.scaling_factor
        )
    return torch.cat(samples), inputs.labels_M[chosen_M]
