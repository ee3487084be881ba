"""Labelled images from folders, Hugging Face datasets and IDX files; what does not fit together is refused at once."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixhead.data.labelled_images import emoji, fashion_mnist, open_both, open_images, read_idx, renumbered
from mixhead.errors import MixheadError


def fill(folder: Path, **images: int) -> Path:
    """Image files in class folders."""
    for name, count in images.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name / f"{number}.png")
    return folder


def test_a_folder_of_classes(tmp_path: Path):
    images = open_images(fill(tmp_path, dog=2, cat=1), "test")
    assert images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 1, 1]
    assert np.asarray(images.read(2))[0, 0, 0] == 1
    assert images.name(2).endswith("dog/1.png")


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_splits(tmp_path: Path, name: str):
    fill(tmp_path / "train", dog=3, cat=1)
    fill(tmp_path / name, dog=1)
    train, test = open_both(tmp_path)
    assert (len(train.labels), len(test.labels)) == (4, 1)
    assert test.classes == train.classes
    assert test.labels.tolist() == [1], "the numbers are those of the training data"
    assert test.read(0).size == (8, 8)


def test_an_empty_class_folder_is_named(tmp_path: Path):
    fill(tmp_path / "train", dog=3, cat=0)
    with pytest.raises(MixheadError, match="train/cat holds no image"):
        open_images(tmp_path, "train")


def test_a_class_seen_only_in_validation_is_named(tmp_path: Path):
    fill(tmp_path / "train", dog=3)
    fill(tmp_path / "val", dog=1, yak=1)
    with pytest.raises(MixheadError, match="class 'yak' is in what is evaluated on, but not in what is trained on"):
        open_both(tmp_path)


def test_folders_that_cannot_be_used(tmp_path: Path):
    with pytest.raises(MixheadError, match="does not exist"):
        open_images(tmp_path / "nowhere", "train")
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "1.png")
    with pytest.raises(MixheadError, match="has no folders"):
        open_images(tmp_path / "flat", "train")
    with pytest.raises(MixheadError, match="no split"):
        open_both(fill(tmp_path / "one", dog=1))
    fill(tmp_path / "half" / "train", dog=1)
    with pytest.raises(MixheadError, match="none of the folders val"):
        open_both(tmp_path / "half")


def test_the_model_must_know_the_classes(tmp_path: Path):
    images = open_images(fill(tmp_path, dog=2, cat=1), "test")
    assert renumbered(images, ("ape", "dog", "cat")).labels.tolist() == [2, 1, 1]
    assert renumbered(images, ("LABEL_0", "LABEL_1")) is images, "a model without names: in their order"
    with pytest.raises(MixheadError, match="class 'cat' is unknown to the model"):
        renumbered(images, ("dog", "ape"))


def test_a_hugging_face_dataset_on_disk(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    fill(tmp_path / "files" / "train", dog=2, cat=1)
    fill(tmp_path / "files" / "val", dog=1, cat=1)
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    parts = {}
    for split, name in (("train", "train"), ("validation", "val")):
        files = sorted((tmp_path / "files" / name).rglob("*.png"))
        rows = {"picture": [f.read_bytes() for f in files], "kind": [f.parent.name for f in files]}
        rows["picture"] = [{"bytes": content, "path": None} for content in rows["picture"]]
        parts[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    train, test = open_both(tmp_path / "saved")
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 1, 1]
    assert np.asarray(train.read(2))[0, 0, 0] == 1
    assert test.name(1) == f"{tmp_path / 'saved'}/validation[1]"


def test_a_damaged_image_in_a_dataset_is_named_by_its_row(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat"])})
    rows = {"image": [{"bytes": b"no picture", "path": None}, None], "label": [0, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    images = open_images(tmp_path / "saved", "train")
    with pytest.raises(MixheadError, match=r"saved\[0\] is no image"):
        images.read(0)
    with pytest.raises(MixheadError, match=r"saved\[1\] is missing"):
        images.read(1)


def write_idx(path: Path, values: np.ndarray, cut: int = 0) -> None:
    head = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, dtype=">u4").tobytes()
    path.write_bytes(gzip.compress((head + values.tobytes())[: -cut or None]))


def test_idx_files(tmp_path: Path):
    pixels = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", pixels)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array([9, 0], dtype=np.uint8))
    images = fashion_mnist(tmp_path, "train")
    assert [images.classes[label] for label in images.labels] == ["ankle boot", "T-shirt"]
    assert np.array_equal(np.asarray(images.read(1))[..., 0], pixels[1])
    write_idx(tmp_path / "cut.gz", pixels, cut=5)
    with pytest.raises(MixheadError, match="cut short"):
        read_idx(tmp_path / "cut.gz", dimensions=3)
    (tmp_path / "plain.gz").write_bytes(b"not zipped")
    with pytest.raises(MixheadError, match="damaged"):
        read_idx(tmp_path / "plain.gz", dimensions=3)


def test_emoji_are_read_by_category(tmp_path):
    (tmp_path / "img/google/64").mkdir(parents=True)
    entries = [
        {"category": "Smileys & Emotion", "image": "a.png", "has_img_google": True},
        {"category": "Flags", "image": "b.png", "has_img_google": False},
        {"category": "Component", "image": "c.png", "has_img_google": True},
        {
            "category": "Animals & Nature",
            "image": "d.png",
            "has_img_google": True,
            "skin_variations": {"1F3FB": {"image": "e.png", "has_img_google": True}},
        },
    ]
    (tmp_path / "emoji.json").write_text(json.dumps(entries))
    found = emoji(tmp_path, "train")
    assert found.classes == ("Animals & Nature", "Smileys & Emotion")
    assert [path.name for path in found.files] == ["a.png", "d.png", "e.png"]
    assert found.labels.tolist() == [1, 0, 0]
    with pytest.raises(MixheadError, match="no package of emoji"):
        emoji(tmp_path / "img", "train")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[" * 10_000])
def test_a_dataset_that_is_damaged_is_refused_in_a_sentence(tmp_path: Path, text: str):
    pytest.importorskip("datasets")
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text(text)
    with pytest.raises(MixheadError, match="is incomplete or corrupt"):
        open_images(tmp_path, "train")
