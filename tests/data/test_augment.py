"""Augmentation does what its papers say, and the same again for the same generator."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from mixhead.data.augment import OPERATIONS, AugmentConfig, augment, crop_box, cut_box, erase, mix, soft_targets
from mixhead.errors import MixheadError

PLAIN = AugmentConfig(randaugment_magnitude=0, color_jitter=0, erasing=0, mixup=0, cutmix=0, label_smoothing=0, flip=0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def photo() -> Image.Image:
    return Image.fromarray(rng().integers(0, 256, (40, 60, 3), dtype=np.uint8))


def test_crops_have_the_area_and_aspect_asked_for():
    config = AugmentConfig(crop_scale=(0.2, 0.5), crop_aspect=(0.8, 1.25))
    generator = rng()
    for _ in range(200):
        left, upper, right, lower = crop_box((60, 40), config, generator)
        assert 0 <= left < right <= 60
        assert 0 <= upper < lower <= 40
        assert 0.18 < (right - left) * (lower - upper) / 2_400 < 0.54
        assert 0.72 < (right - left) / (lower - upper) < 1.4


def test_a_very_long_image_is_cropped_in_the_middle():
    assert crop_box((600, 10), AugmentConfig(crop_scale=(1.0, 1.0)), rng()) == (293, 0, 306, 10)


def test_the_same_generator_gives_the_same_image():
    first, again, other = (np.asarray(augment(photo(), 24, AugmentConfig(), rng(seed))) for seed in (1, 1, 2))
    assert first.shape == (24, 24, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_the_size_and_change_more_at_a_higher_level(name: str):
    slope = np.add.outer(np.arange(32), np.arange(32))[..., None] * np.array([4, 3, 2])
    image = Image.fromarray((slope + rng().integers(0, 20, slope.shape)).clip(0, 255).astype(np.uint8))
    before = np.asarray(image).astype(int)

    def change(level: float) -> float:
        after = OPERATIONS[name](image, level, 1.0)
        assert (after.size, after.mode) == ((32, 32), "RGB")
        return float(np.abs(np.asarray(after).astype(int) - before).mean())

    assert change(0.9) > 0
    assert change(0.9) >= change(0.3)


def test_erasing_replaces_one_rectangle():
    pixels_CYX = torch.full((3, 20, 30), 9.0)
    erased_CYX = erase(pixels_CYX, 1.0, rng(3))
    changed_YX = (erased_CYX != 9.0).all(0)
    rows, columns = changed_YX.any(1).sum(), changed_YX.any(0).sum()
    assert changed_YX.sum() == rows * columns
    assert 0.01 < changed_YX.float().mean() < 0.4
    assert (pixels_CYX == 9.0).all(), "the original stays"
    assert erase(pixels_CYX, 0.0, rng()) is pixels_CYX


def test_smoothing_spreads_a_share_over_all_classes():
    targets_BL = soft_targets(torch.tensor([1]), 4, 0.1)
    torch.testing.assert_close(targets_BL, torch.tensor([[0.025, 0.925, 0.025, 0.025]]))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_targets_are_mixed_as_the_images_are(kind: str):
    config = AugmentConfig(**{"mixup": 0.0, "cutmix": 0.0, kind: 1.0})
    pixels_BCYX = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 16, 16).clone()
    targets_BL = torch.eye(2)
    for seed in range(20):
        mixed_BCYX, mixed_BL = mix(pixels_BCYX, targets_BL, config, rng(seed))
        torch.testing.assert_close(mixed_BCYX.mean((1, 2, 3)), mixed_BL[:, 1])
        torch.testing.assert_close(mixed_BL.sum(1), torch.ones(2))
    assert (pixels_BCYX[0] == 0).all(), "the originals stay"


def test_cutmix_cuts_the_share_that_lambda_says():
    sizes = [(b - t) * (r - le) / 400 for t, b, le, r in (cut_box((20, 20), 0.75, rng(seed)) for seed in range(300))]
    assert max(sizes) == pytest.approx(0.25)
    assert min(sizes) < 0.1, "some of it may lie outside"


def test_nothing_is_mixed_where_nothing_is_asked_for():
    pixels_BCYX, targets_BL = torch.rand(2, 3, 8, 8), torch.eye(2)
    assert mix(pixels_BCYX, targets_BL, PLAIN, rng())[0] is pixels_BCYX
    assert mix(pixels_BCYX, targets_BL, AugmentConfig(mix=0.0), rng())[0] is pixels_BCYX


def test_without_randaugment_colours_jitter():
    whole = {"crop_scale": (1.0, 1.0), "crop_aspect": (1.0, 1.0), "flip": 0.0, "randaugment_magnitude": 0.0}
    square = photo().resize((32, 32))
    still = augment(square, 32, AugmentConfig(**whole, color_jitter=0.0), rng())
    jittered = augment(square, 32, AugmentConfig(**whole, color_jitter=0.4), rng())
    assert np.array_equal(np.asarray(still), np.asarray(square))
    assert not np.array_equal(np.asarray(jittered), np.asarray(square))


@pytest.mark.parametrize(
    "wrong",
    [{"flip": 1.5}, {"crop_scale": (0.9, 0.1)}, {"crop_scale": (0.1, 1.1)}, {"randaugment_magnitude": 11}]
    + [{"mixup": -1.0}, {"label_smoothing": 1.0}, {"erasing": math.nan}],
)
def test_impossible_settings_are_refused(wrong: dict):
    with pytest.raises(MixheadError, match=next(iter(wrong))):
        AugmentConfig(**wrong)
