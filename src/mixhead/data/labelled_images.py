"""Labelled images to train and evaluate on: a folder of classes, a Hugging Face dataset on disk, or known by name."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from mixhead.data.fetch import data_folder
from mixhead.data.image_files import image_files, pillow, read_image
from mixhead.errors import MixheadError, first_line, listed

if TYPE_CHECKING:
    from PIL.Image import Image

Split = Literal["train", "test"]
FASHION_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
# What the splits of a data set are called on disk, the usual name first.
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("val", "validation", "valid", "test"),
}


class LabelledImages(Protocol):
    """Images with one class each."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their numbers."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """The class number of every image."""
        ...

    def read(self, index: int) -> Image:
        """One image as RGB; a MixheadError names what cannot be read."""
        ...

    def name(self, index: int) -> str:
        """What messages call that image."""
        ...


@dataclass(frozen=True, eq=False)
class FolderImages:
    """Image files, each in the folder of its class."""

    classes: tuple[str, ...]
    labels: np.ndarray
    files: tuple[Path, ...]

    def read(self, index: int) -> Image:
        return read_image(self.files[index])

    def name(self, index: int) -> str:
        return str(self.files[index])


@dataclass(frozen=True, eq=False)
class DatasetImages:
    """One split of a Hugging Face dataset, whose images stay encoded until they are read."""

    classes: tuple[str, ...]
    labels: np.ndarray
    dataset: Any  # rows {"bytes": ..., "path": ...} in the column `column`
    column: str
    where: str

    def read(self, index: int) -> Image:
        entry = self.dataset[index][self.column]
        if entry is None or (entry["bytes"] is None and entry["path"] is None):
            raise MixheadError(f"The image {self.name(index)} is missing.")
        return read_image(entry["bytes"] or Path(entry["path"]), self.name(index))

    def name(self, index: int) -> str:
        return f"{self.where}[{index}]"


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Grey images in memory, uint8 [images, height, width]."""

    classes: tuple[str, ...]
    labels: np.ndarray
    pixels: np.ndarray
    where: str

    def read(self, index: int) -> Image:
        pillow_image, _ = pillow()
        return pillow_image.fromarray(self.pixels[index]).convert("RGB")

    def name(self, index: int) -> str:
        return f"{self.where}[{index}]"


def open_images(where: str | Path, split: Split = "train") -> LabelledImages:
    """One split of a data set.

    Args:
        where: "fashion-mnist" or "emoji" (`mixhead fetch NAME` first); a folder that a Hugging Face dataset was saved
            to (`save_to_disk`), with an Image and a ClassLabel column; or a folder with one folder of image files per
            class. There, `train` and `val` may lie in between: `where/train/cat/1.jpg`.
        split: "train", or "test" for what is evaluated on. A folder without splits serves as both.

    Raises:
        MixheadError: where there is no such data, or a class has no image.
    """
    if where in NAMED:
        name = str(where)
        return NAMED[name](data_folder(name), split)
    folder = Path(where)
    if not folder.is_dir():
        raise MixheadError(
            f"The folder of images {folder} does not exist; data sets with a name are {' and '.join(NAMED)}."
        )
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return dataset_images(folder, split)
    return folder_images(split_folder(folder, split))


def open_both(where: str | Path) -> tuple[LabelledImages, LabelledImages]:
    """What to train on and what to evaluate on, with the same class numbers.

    Raises:
        MixheadError: where either is missing, or has a class that the model would never be trained on.
    """
    train = open_images(where, "train")
    test = open_images(where, "test")
    if isinstance(train, FolderImages) and isinstance(test, FolderImages) and train.files == test.files:
        raise MixheadError(
            f"{where} has no split into `train` and `val`: give both, so that what is measured was not trained on."
        )
    unseen = sorted(used_classes(test) - used_classes(train))
    if unseen:
        raise MixheadError(
            f"{where}: {quoted(unseen)} in what is evaluated on, but not in what is trained on: add images of it to "
            "the training data or take it out."
        )
    return train, renumbered(test, train.classes)


def renumbered(images: LabelledImages, classes: tuple[str, ...]) -> LabelledImages:
    """The same images with the class numbers of a model or of other data.

    A model without names of its own (LABEL_0, LABEL_1, ...), as published checkpoints are, takes the classes in their
    order, where it knows as many.

    Raises:
        MixheadError: where a class is not among `classes`.
    """
    nameless = classes == tuple(f"LABEL_{number}" for number in range(len(images.classes)))
    if images.classes == classes or nameless:
        return images
    unknown = sorted(used_classes(images) - set(classes))
    if unknown:
        raise MixheadError(f"The {quoted(unknown)} unknown to the model, which knows {listed(list(classes), 5)}.")
    places = np.array([classes.index(name) if name in classes else -1 for name in images.classes])
    return View(classes, places[images.labels], images, np.arange(len(images.labels)))


@dataclass(frozen=True, eq=False)
class View:
    """Some of the images of another source, or all of them under other class numbers."""

    classes: tuple[str, ...]
    labels: np.ndarray
    images: LabelledImages
    indices: np.ndarray

    def read(self, index: int) -> Image:
        return self.images.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.images.name(int(self.indices[index]))


def part(images: LabelledImages, number: int, parts: int) -> View:
    """Every `parts`-th image, from `number` on: what one of several processes looks at."""
    indices = np.arange(number, len(images.labels), parts)
    return View(images.classes, images.labels[indices], images, indices)


def used_classes(images: LabelledImages) -> set[str]:
    """The classes that at least one image has."""
    return {images.classes[label] for label in np.unique(images.labels)}


def check_classes(wanted: Iterable[str], images: LabelledImages) -> None:
    """Raises where a class is unknown or has no image."""
    unknown = next((name for name in wanted if name not in used_classes(images)), None)
    if unknown is not None:
        raise MixheadError(f"The class {unknown!r} is unknown or has no image.")


def quoted(names: list[str]) -> str:
    """A few names of classes, for a message."""
    listing = ", ".join(repr(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"class {listing} is" if len(names) == 1 else f"classes {listing} are"


# Folders of classes


def split_folder(folder: Path, split: Split) -> Path:
    """The folder of that split; the folder itself where it has no splits."""
    found = {name: folder / name for names in SPLIT_NAMES.values() for name in names if (folder / name).is_dir()}
    if not found:
        return folder
    for name in SPLIT_NAMES[split]:
        if name in found:
            return found[name]
    raise MixheadError(f"{folder} has {', '.join(found)}, but none of the folders {', '.join(SPLIT_NAMES[split])}.")


def folder_images(folder: Path) -> FolderImages:
    """The images of a folder with one folder per class; classes are numbered in the order of their names."""
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise MixheadError(f"{folder} has no folders: put the images of each class into a folder of its name.")
    files: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        found = image_files(folder / name)
        if not found:
            raise MixheadError(f"The class folder {folder / name} holds no image: fill it or delete it.")
        files += found
        labels += [number] * len(found)
    return FolderImages(tuple(classes), np.array(labels), tuple(files))


# Hugging Face datasets


def dataset_images(folder: Path, split: Split) -> DatasetImages:
    """One split of a dataset that was saved with `save_to_disk`; nothing of it is executed."""
    try:
        from datasets import ClassLabel, DatasetDict, load_from_disk
        from datasets import Image as ImageFeature
    except ImportError as error:
        raise MixheadError(f"{folder} is a Hugging Face dataset: install the package `datasets` to read it.") from error
    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # datasets, pyarrow and json raise many types on corrupt files
        raise MixheadError(f"The dataset {folder} is incomplete or corrupt ({first_line(error)}).") from error
    if isinstance(loaded, DatasetDict):
        name = next((name for name in SPLIT_NAMES[split] if name in loaded), None)
        if name is None:
            raise MixheadError(f"{folder} has {', '.join(loaded)}, but none of {', '.join(SPLIT_NAMES[split])}.")
        loaded, where = loaded[name], f"{folder}/{name}"
    else:
        where = str(folder)
    columns = {
        kind: [column for column, feature in loaded.features.items() if isinstance(feature, kind)]
        for kind in (ImageFeature, ClassLabel)
    }
    for kind, what in ((ImageFeature, "Image"), (ClassLabel, "ClassLabel")):
        if len(columns[kind]) != 1:
            raise MixheadError(f"{where} must have one column of type {what}, but it has {columns[kind] or 'none'}.")
    [image], [label] = columns[ImageFeature], columns[ClassLabel]
    classes = tuple(loaded.features[label].names)
    labels = np.array(loaded[label])
    if len(labels) == 0:
        raise MixheadError(f"{where} is empty.")
    if not ((labels >= 0) & (labels < len(classes))).all():
        raise MixheadError(f"{where} has images without a class, for example number {int(np.argmin(labels))}.")
    return DatasetImages(classes, labels, loaded.cast_column(image, ImageFeature(decode=False)), image, where)


# Fashion-MNIST


def fashion_mnist(folder: Path, split: Split) -> ArrayImages:
    """Fashion-MNIST (arXiv 1708.07747): 60,000 and 10,000 grey images of clothes, 28 x 28 pixels."""
    prefix = "train" if split == "train" else "t10k"
    pixels = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
    if len(pixels) != len(labels) or len(labels) == 0 or labels.max() >= len(FASHION_CLASSES):
        raise MixheadError(f"The files of Fashion-MNIST in {folder} do not fit together: fetch them again.")
    return ArrayImages(FASHION_CLASSES, labels.astype(np.int64), pixels, f"fashion-mnist/{split}")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of a gzipped IDX file: two zero bytes, the type 8, the dimensions, their sizes, the values."""
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise MixheadError(f"The file {path} is missing or damaged ({error}): fetch it again.") from error
    start = 4 + 4 * dimensions
    sizes = np.frombuffer(content[4:start], dtype=">u4").astype(int)
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(sizes) != dimensions or len(content) != start + sizes.prod():
        raise MixheadError(f"The file {path} is no IDX file with {dimensions} dimensions, or it is cut short.")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(sizes)


# Google's emoji


def emoji(folder: Path, split: Split) -> FolderImages:
    """The emoji of Google's Noto font, 64 x 64 pixels, by category; variants of the skin colour count as well.

    Args:
        folder: of the npm package `emoji-datasource-google`.
        split: both are the same images.
    """
    del split
    try:
        entries = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
        found = [
            (entry["category"], folder / "img/google/64" / variant["image"])
            for entry in entries
            for variant in (entry, *entry.get("skin_variations", {}).values())
            if entry["category"] != "Component" and variant["has_img_google"]  # components are pieces of emoji
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MixheadError(f"{folder} is no package of emoji ({error}): fetch it again.") from error
    classes = tuple(sorted({category for category, _ in found}))
    labels = np.array([classes.index(category) for category, _ in found])
    return FolderImages(classes, labels, tuple(path for _, path in found))


# Known by name, and fetched with `mixhead fetch NAME`.
NAMED: dict[str, Callable[[Path, Split], LabelledImages]] = {"fashion-mnist": fashion_mnist, "emoji": emoji}
