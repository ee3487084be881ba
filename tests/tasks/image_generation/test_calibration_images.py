"""Images to calibrate a diffusion transformer on, as pixels and as latents."""

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed")

import numpy as np
import torch
from diffusers import AutoencoderKL

from mixhead.data.labelled_images import ArrayImages
from mixhead.errors import MixheadError
from mixhead.models.moh_dit import MoHDiTConfig
from mixhead.tasks.image_generation.calibration_images import calibration_samples

SIZES = {"hidden_size": 24, "depth": 1, "num_heads": 2, "num_classes": 2}


def pictures(count=10):
    """Black pictures of class 0 and white ones of class 1, 16 x 16."""
    labels = np.arange(count) % 2
    pixels = np.zeros((count, 16, 16), np.uint8) + (255 * labels[:, None, None]).astype(np.uint8)
    return ArrayImages(("black", "white"), labels, pixels, "pictures")


def test_pixels_with_their_classes():
    config = MoHDiTConfig(**SIZES, sample_size=8, in_channels=1)
    samples, classes = calibration_samples(pictures(), config, None, 6)
    assert samples.shape == (6, 1, 8, 8)
    assert samples.mean((1, 2, 3)).tolist() == [2.0 * label - 1.0 for label in classes]
    assert calibration_samples(pictures(), config, None, 99)[0].shape[0] == 10
    again, _ = calibration_samples(pictures(), config, None, 6)
    assert again.equal(samples)


def test_latents_are_scaled_and_of_the_size_of_the_model():
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.5,
    ).eval()
    config = MoHDiTConfig(**SIZES, sample_size=8, in_channels=4)
    samples, classes = calibration_samples(pictures(), config, vae, 3)
    assert samples.shape == (3, 4, 8, 8)
    image = torch.full((1, 3, 16, 16), 2.0 * int(classes[0]) - 1.0)
    expected = vae.encode(image).latent_dist.mean * 0.5
    torch.testing.assert_close(samples[:1], expected, rtol=1e-2, atol=1e-3)


def test_what_does_not_fit():
    with pytest.raises(MixheadError, match="The images have 2 classes, but the model was trained on 5"):
        calibration_samples(pictures(), MoHDiTConfig(**{**SIZES, "num_classes": 5}), None, 3)
    with pytest.raises(MixheadError, match="works on latents: name the folder of its VAE"):
        calibration_samples(pictures(), MoHDiTConfig(**SIZES, in_channels=4), None, 3)
