"""Where patches stand: the map has the sides of the image, whatever stands before it."""

from types import SimpleNamespace

import pytest

from mixhead.models.patches import halved, patch_grid


@pytest.mark.parametrize(
    ("patch", "image", "tokens", "grid"),
    [
        (4, (16, 16), 17, (4, 4)),
        (4, (16, 32), 33, (4, 8)),  # a square map would be 5 x 5 of the 33
        (4, (32, 16), 32 + 5, (8, 4)),  # registers too
        ((8, 4), (16, 32), 17, (2, 8)),  # patches that are not square
        ([2, 8, 4], (16, 32), 16, (2, 8)),  # of a video model
        (14, (230, 100), 16 * 7 + 1, (16, 7)),  # what fills no patch is left out
        (4, (34, 50), 9 * 13, (9, 13)),  # or begins one (padding)
        (4, (32, 64), 4 * 8, (4, 8)),  # the second stage of a model whose first map has 8 x 16 patches
        (4, (32, 64), 1, (1, 1)),
        (None, (16, 32), 32, (4, 8)),
    ],
)
def test_rows_and_columns(patch, image, tokens, grid):
    assert patch_grid(SimpleNamespace(patch_size=patch), image, tokens) == grid


def test_the_patches_of_the_vision_part_count():
    config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=4))
    assert patch_grid(config, (16, 32), 33) == (4, 8)


def test_a_map_that_is_larger_than_the_tokens_is_halved():
    assert halved([(8, 16)], 128) == (8, 16)
    assert halved([(8, 16)], 33) == (4, 8)
    assert halved([(7, 13)], 4 * 7) == (4, 7)
