"""Images drawn by a model, as PNG files, and back.

Shape legend: B batch, C channels, Y rows, X columns.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.tasks.checkpoints import write_bytes


def write_png(image_CYX: Tensor, path: Path) -> None:
    """Writes one image, uint8 [1 or 3, Y, X]; a file that is half written never bears its name."""
    from PIL import Image

    pixels = image_CYX.permute(1, 2, 0).squeeze(-1).contiguous().numpy()
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", optimize=True)
    write_bytes(path, content.getvalue())
