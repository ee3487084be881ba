"""Image files, read safely: what a file holds is checked before it is decoded, and errors name the file.

What is done with unusual files, once and for all:

| File | Becomes |
|---|---|
| grey, palette, CMYK, any other colour space | RGB |
| transparent | on white |
| 16 or 32 bits a channel | 8 bits |
| animated, several pages | its first picture |
| turned by its EXIF entry | upright |
| truncated, damaged, no image at all | an error |
| more than 64 million pixels | an error, before anything is decoded |
| a side of less than 4 pixels, or one 64 times as long as the other | an error: nothing is to be seen on it |
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from mixhead.errors import MixheadError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 64_000_000
MIN_SIDE = 4
MAX_ASPECT = 64
# What files of images are called; others in a folder are no images and left alone.
SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))
# What Pillow may take a file for, whatever it is called: its reader of PostScript, for one, starts an interpreter.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def read_image(source: Path | bytes, name: str | None = None) -> Image:
    """An image as RGB with 8 bits a channel, upright.

    Args:
        source: a file, or its content.
        name: what errors call it; the path by default.

    Raises:
        MixheadError: where the file is missing, damaged, no image, or of a size that makes no sense; it names the file.
    """
    pillow_image, _ = pillow()
    name = str(source) if name is None else name
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes beyond its own limit; ours is checked below and is an error.
            warnings.simplefilter("ignore", pillow_image.DecompressionBombWarning)
            opened = io.BytesIO(source) if isinstance(source, bytes) else source
            with pillow_image.open(opened, formats=FORMATS) as image:
                check_size(image.size, name)
                image.load()
                return to_rgb(image)
    except MixheadError:
        raise
    except FileNotFoundError as error:
        raise MixheadError(f"The image {name} does not exist.") from error
    except IsADirectoryError as error:
        raise MixheadError(f"{name} is a folder: give image files.") from error
    except pillow_image.UnidentifiedImageError as error:
        raise MixheadError(f"The file {name} is no image that can be read, whatever its name says.") from error
    except pillow_image.DecompressionBombError as error:
        raise MixheadError(f"The image {name} is refused as too large to be honest ({error}).") from error
    except Exception as error:  # a damaged file surfaces as whatever its decoder trips over
        raise MixheadError(f"The image {name} is damaged or cut short ({type(error).__name__}: {error}).") from error


def check_size(size: tuple[int, int], name: str) -> None:
    """Raises where nothing sensible can be decoded from an image of `size` pixels (width, height)."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise MixheadError(
            f"The image {name} has {width} x {height} pixels, more than {MAX_PIXELS:,}: it is not decoded, since such "
            "files can fill all memory. Make it smaller."
        )
    if min(size) < MIN_SIDE:
        raise MixheadError(
            f"The image {name} has {width} x {height} pixels; either side must have at least {MIN_SIDE}: nothing is to "
            "be seen on a smaller one."
        )
    if max(size) > MAX_ASPECT * min(size):
        raise MixheadError(
            f"The image {name} has {width} x {height} pixels: one side may be at most {MAX_ASPECT} times the other."
        )


def to_rgb(image: Image) -> Image:
    """The same picture as RGB with 8 bits a channel, upright, on white where it is transparent."""
    pillow_image, image_ops = pillow()
    image = image_ops.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = pillow_image.new("RGBA", image.size, "white")
        image = pillow_image.alpha_composite(white, image)
    return image.convert("RGB")


def to_8_bits(image: Image) -> Image:
    """A grey image with 16 or 32 bits as one with 8. Pillow alone would clip: all but the darkest became white."""
    import numpy as np

    pillow_image, _ = pillow()
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.mode == "F" and values.max() <= 1.0:
        scale = 255.0
    else:
        # 32-bit files mostly hold 16-bit values; whatever exceeds them is relative to the brightest pixel.
        scale = 255.0 / max(65_535.0, float(values.max()))
    return pillow_image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and the folders in it, sorted; hidden ones and other files are left alone."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts))


def pillow():  # type: ignore[no-untyped-def]
    """Pillow's `Image` and `ImageOps`; raises a MixheadError where it is not installed."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MixheadError("Images need Pillow: install it with `pip install 'mixhead[vision]'`.") from error
    return Image, ImageOps
