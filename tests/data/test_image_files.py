"""Every kind of image file that people have is read, or refused with a sentence that names it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixhead.data import image_files as images
from mixhead.data.image_files import image_files, read_image
from mixhead.errors import MixheadError

SIZE = (12, 8)


def ramp(mode: str = "RGB") -> Image.Image:
    """Darkest on the left."""
    values = np.tile(np.linspace(0, 255, SIZE[0]).astype(np.uint8), (SIZE[1], 1))
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"),
        ("L", "png"),
        ("P", "gif"),
        ("P", "png"),
        ("CMYK", "jpg"),
        ("1", "png"),
        ("RGBA", "webp"),
        ("LA", "png"),
    ],
)
def test_every_colour_space_becomes_rgb(tmp_path: Path, mode: str, suffix: str):
    file = tmp_path / f"image.{suffix}"
    ramp(mode).save(file)
    image = read_image(file)
    assert (image.mode, image.size) == ("RGB", SIZE)
    assert np.asarray(image)[:, 0].mean() < 20 < 235 < np.asarray(image)[:, -1].mean()


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX"])
def test_only_the_formats_of_the_list_are_opened_whatever_a_file_is_called(tmp_path: Path, kind: str, monkeypatch):
    """Pillow would hand PostScript to an interpreter."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("was started"))
    for name in ("image.png", "image.eps"):
        ramp().save(tmp_path / name, kind)
        with pytest.raises(MixheadError, match=r"image\.\w+ is no image that can be read"):
            read_image(tmp_path / name)
        with pytest.raises(MixheadError, match="is no image that can be read"):
            read_image((tmp_path / name).read_bytes(), "bytes")


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP"])
def test_the_formats_of_the_list(tmp_path: Path, kind: str):
    """MPO is what many cameras write as JPEG."""
    ramp().save(tmp_path / "image", kind, **({"save_all": True, "append_images": [ramp()]} if kind == "MPO" else {}))
    assert read_image(tmp_path / "image").size == SIZE


@pytest.mark.parametrize(("dtype", "suffix"), [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif")])
def test_sixteen_bits_become_eight_and_are_not_clipped(tmp_path: Path, dtype: type, suffix: str):
    values = np.tile(np.linspace(0, 65_535, SIZE[0]), (SIZE[1], 1)).astype(dtype)
    file = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(file)
    row = np.asarray(read_image(file))[0, :, 0].astype(int)
    assert np.abs(row - np.linspace(0, 255, SIZE[0])).max() <= 1


def test_floating_point_images_keep_their_range(tmp_path: Path):
    file = tmp_path / "float.tif"
    Image.fromarray(np.tile(np.linspace(0, 1, SIZE[0], dtype=np.float32), (SIZE[1], 1))).save(file)
    assert np.asarray(read_image(file))[0, :, 0].tolist()[:: SIZE[0] - 1] == [0, 255]


def test_transparency_lies_on_white(tmp_path: Path):
    clear = Image.new("RGBA", SIZE, (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png")).min() == 255


def test_an_animation_is_its_first_picture(tmp_path: Path):
    file = tmp_path / "animated.gif"
    first, second = Image.new("RGB", SIZE, "black"), Image.new("RGB", SIZE, "white")
    first.save(file, save_all=True, append_images=[second, first])
    assert np.asarray(read_image(file)).max() == 0


def test_exif_turns_the_image_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    ramp().save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == SIZE[::-1]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
def test_truncated_files_are_named(tmp_path: Path, suffix: str):
    file = tmp_path / f"half.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(MixheadError, match=rf"half\.{suffix} .*(damaged|no image)"):
        read_image(file)


def test_a_text_named_jpg_an_empty_file_and_no_file_at_all(tmp_path: Path):
    (tmp_path / "text.jpg").write_text("I am not a picture")
    (tmp_path / "empty.png").touch()
    for name in ("text.jpg", "empty.png"):
        with pytest.raises(MixheadError, match=f"{name} is no image"):
            read_image(tmp_path / name)
    with pytest.raises(MixheadError, match=r"gone\.png does not exist"):
        read_image(tmp_path / "gone.png")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "bomb.png"
    Image.new("1", (9_000, 9_000)).save(file)  # 10 kB on the disk
    monkeypatch.setattr(images, "to_rgb", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(MixheadError, match=r"bomb\.png has 9000 x 9000 pixels, more than 64,000,000"):
        read_image(file)
    Image.new("1", (20_000, 20_000)).save(file)  # beyond Pillow's own limit
    with pytest.raises(MixheadError, match=r"bomb\.png is refused"):
        read_image(file)


@pytest.mark.parametrize(
    ("size", "why"), [((1, 1), "at least 4"), ((500, 3), "at least 4"), ((1_000, 4), "at most 64 times")]
)
def test_pixels_and_lines_are_no_images(tmp_path: Path, size: tuple[int, int], why: str):
    file = tmp_path / "line.png"
    Image.new("RGB", size).save(file)
    with pytest.raises(MixheadError, match=rf"line\.png has {size[0]} x {size[1]} pixels.*{why}"):
        read_image(file)


def test_content_is_read_like_a_file(tmp_path: Path):
    ramp().save(tmp_path / "a.png")
    assert read_image((tmp_path / "a.png").read_bytes(), "row 3").size == SIZE
    with pytest.raises(MixheadError, match="row 4 is no image"):
        read_image(b"nothing", "row 4")


def test_other_files_and_hidden_ones_are_no_images(tmp_path: Path):
    for name in ("b/2.JPG", "a/1.png", "a/notes.txt", "a/.thumb.png", ".git/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(file.relative_to(tmp_path)) for file in image_files(tmp_path)] == ["a/1.png", "b/2.JPG"]
