"""What a run reads depends on its seed and on the place in it, and a bad file stops no run in its middle."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixhead.data.augment import AugmentConfig
from mixhead.data.image_batches import ImageOrder, MixingCollator, TrainTransform, refuse_unreadable
from mixhead.data.labelled_images import FolderImages, folder_images
from mixhead.errors import MixheadError

TRANSFORM = TrainTransform(size=16, mean=(0.5,) * 3, std=(0.25,) * 3, augmentation=AugmentConfig(erasing=0.5))


@pytest.fixture
def images(tmp_path: Path) -> FolderImages:
    """Six images of two classes; the brightness is the number of the image."""
    for number in range(6):
        folder = tmp_path / ("cat" if number < 3 else "dog")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (40 * number,) * 3).save(folder / f"{number}.png")
    return folder_images(tmp_path)


def damage(images: FolderImages, *numbers: int) -> None:
    for number in numbers:
        images.files[number].write_bytes(images.files[number].read_bytes()[:40])


def order(images: FolderImages, **settings: int) -> ImageOrder:
    return ImageOrder(images, TRANSFORM, **{"length": 12, "seed": 0, **settings})


def test_every_round_reads_every_image_once(images: FolderImages):
    labels = [label for _, _, label in map(order(images).__getitem__, range(12))]
    assert labels[:6] != labels[6:], "the rounds have different orders"
    assert sorted(labels[:6]) == sorted(labels[6:]) == [0, 0, 0, 1, 1, 1]


def test_a_sample_depends_on_seed_and_place_alone(images: FolderImages):
    forwards = [pixels for _, pixels, _ in map(order(images).__getitem__, range(12))]
    backwards = [pixels for _, pixels, _ in map(order(images).__getitem__, reversed(range(12)))]
    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))
    other = [pixels for _, pixels, _ in map(order(images, seed=1).__getitem__, range(12))]
    assert not all(torch.equal(a, b) for a, b in zip(forwards, other, strict=True))


def test_repeated_augmentation_shows_an_image_several_times_in_a_row_changed_differently(images: FolderImages):
    plain = AugmentConfig(crop_scale=(1, 1), flip=0, randaugment_magnitude=0, erasing=0, color_jitter=0)
    still = ImageOrder(images, TrainTransform(16, (0.5,) * 3, (0.25,) * 3, plain), 6, seed=0, repeats=3)
    seen = [float(pixels.mean()) for _, pixels, _ in map(still.__getitem__, range(6))]
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4] == seen[5]
    _, first, _ = order(images, repeats=3)[0]
    _, second, _ = order(images, repeats=3)[1]
    assert not torch.equal(first, second)


def test_a_bad_image_is_replaced_by_the_next_and_named(images: FolderImages, caplog: pytest.LogCaptureFixture):
    damage(images, 2)
    with caplog.at_level(logging.WARNING):
        labels = [label for _, _, label in map(order(images, length=6).__getitem__, range(6))]
    assert sorted(labels) == [0, 0, 1, 1, 1, 1], "number 3, a dog, stood in"
    assert "cat/2.png is no image" in caplog.text


def test_where_no_image_can_be_read_the_run_ends_with_a_sentence(images: FolderImages):
    damage(images, *range(6))
    with pytest.raises(MixheadError, match="None of the 6 images"):
        order(images)[0]


def test_bad_images_are_refused_together_before_a_run(images: FolderImages):
    refuse_unreadable(images)
    damage(images, 1, 4)
    with pytest.raises(MixheadError, match=r"2 of 6 images cannot be read.*cat/1\.png.*dog/4\.png.*unreadable=skip"):
        refuse_unreadable(images)


def test_a_batch_has_normalised_pixels_and_soft_targets(images: FolderImages):
    samples = [order(images)[place] for place in range(4)]
    collator = MixingCollator(2, AugmentConfig(), seed=0)
    batch = collator(samples)
    assert batch["pixel_values"].shape == (4, 3, 16, 16)
    torch.testing.assert_close(batch["targets"].sum(1), torch.ones(4))
    assert all(torch.equal(batch[name], collator(samples)[name]) for name in batch), "the same again"


def test_the_transform_normalises():
    plain = AugmentConfig(crop_scale=(1, 1), flip=0, randaugment_magnitude=0, erasing=0, color_jitter=0)
    transform = TrainTransform(8, (0.5, 0.5, 0.5), (0.25, 0.5, 1.0), plain)
    pixels_CYX = transform(Image.new("RGB", (8, 8), (255, 255, 255)), np.random.default_rng(0))
    assert pixels_CYX[:, 0, 0].tolist() == [2.0, 1.0, 0.5]
