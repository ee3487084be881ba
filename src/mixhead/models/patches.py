"""Where the patches of an image stand: rows and columns of the map that a model of images makes of it."""

from __future__ import annotations

import math
from typing import Any

Grid = tuple[int, int]
GRIDS = "patch_grids"  # under this name a recording remembers the finest map of each picture


def patch_grid(config: Any, image: Grid, tokens: int) -> Grid:
    """Rows and columns of the patches among the tokens of a layer; what is left over stands before them.

    Args:
        config: of the model; its `patch_size`, or that of its vision part, is used.
        image: rows and columns of the pixels that the model was given.
        tokens: of the layer. Hierarchical models halve their map from stage to stage.
    """
    patch = getattr(config, "patch_size", None) or getattr(getattr(config, "vision_config", None), "patch_size", None)
    if patch is None:
        rows = max(1, math.isqrt(tokens * image[0] // image[1]))
        return rows, tokens // rows
    sides = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
    exact = [pixels / side for pixels, side in zip(image, sides, strict=True)]
    return halved([(math.floor(exact[0]), math.floor(exact[1])), (math.ceil(exact[0]), math.ceil(exact[1]))], tokens)


def halved(grids: list[Grid], tokens: int) -> Grid:
    """Of these maps, and those that come of halving their sides, the largest that has no more places than tokens."""
    found = []
    for rows, columns in grids:
        while rows * columns > tokens:
            rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
            if rows == columns == 1:
                break
        found.append((rows, columns))
    return max((grid for grid in found if grid[0] * grid[1] <= tokens), key=math.prod, default=(1, tokens))
