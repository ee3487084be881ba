"""Many images drawn into a folder: by one process or several, and again where it was interrupted.

Shape legend: B batch, C channels, Y rows, X columns.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mixhead.data.image_files import image_files, read_image
from mixhead.data.latents import processes
from mixhead.data.noised_images import square
from mixhead.errors import MixheadError
from mixhead.files import changes_since_begun, write_bytes
from mixhead.tasks.image_generation.sampling import OnProgress, class_names, grid, sample_images
from mixhead.tasks.image_generation.sampling_config import SamplingConfig

if TYPE_CHECKING:
    from mixhead.models.moh_dit import MoHDiTPipeline

MANIFEST = "samples.json"
# What changes how images are drawn, but not the images.
HARMLESS = ("batch_size",)
GRID = 400  # at most so many images on the grid


def write_png(image_CYX: Tensor, path: Path) -> None:
    """Writes one image, uint8 [1 or 3, Y, X]; a file that is half written never bears its name."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(image_CYX.permute(1, 2, 0).squeeze(-1).contiguous().numpy()).save(content, "PNG", optimize=True)
    write_bytes(path, content.getvalue())


def image_batches(folder: Path, batch: int = 50) -> Iterator[Tensor]:
    """The images of a folder and its folders in the order of their names, uint8 [B, 3, Y, X].

    Args:
        folder: of image files.
        batch: images of one batch.

    Raises:
        MixheadError: where there is no image, one is damaged, or one has another size than the first.
    """
    files = image_files(folder)
    if not files:
        raise MixheadError(f"The folder {folder} holds no image.")
    expected: tuple[int, int] | None = None
    for start in range(0, len(files), batch):
        images = []
        for path in files[start : start + batch]:
            image = read_image(path)
            expected = expected or image.size
            if image.size != expected:
                raise MixheadError(
                    f"The image {path} has {image.width} x {image.height} pixels, but the first one of the folder has "
                    f"{expected[0]} x {expected[1]}: all must be of one size."
                )
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        yield torch.stack(images)


def sample_path(folder: Path, number: int, name: str) -> Path:
    """The file of a sample: its number, and the name of its class in letters that every file system takes."""
    return folder / f"{number:06d}-{re.sub(r'[^a-z0-9]+', '-', name.casefold()).strip('-')}.png"


def draw_folder(
    pipeline: MoHDiTPipeline,
    classes: Sequence[int],
    config: SamplingConfig,
    folder: Path,
    model: Path,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Path]:
    """Draws an image of every class in a list, each into a file of its own.

    Under `torchrun --nproc_per_node`, every process draws a part. What an interrupted call left is kept: the same call
    draws the rest.

    Args:
        pipeline: the trained model.
        classes: class of every sample.
        config: how.
        folder: of the files.
        model: folder that the pipeline was read from; a folder with images of another model is refused.
        on_progress: called with (images done, all) of this process, without those that the folder held already.

    Returns:
        The files of all samples, in order; of several processes, the other ones than the first return none.

    Raises:
        MixheadError: where the folder holds other samples, or drawing fails.
    """
    state = processes()
    names = class_names(pipeline)
    files = [sample_path(folder, number, names[label]) for number, label in enumerate(classes)]
    if state.is_main_process:
        asked = {name: value for name, value in asdict(config).items() if name not in HARMLESS}
        different = changes_since_begun(folder / MANIFEST, {**asked, "classes": list(names), **fingerprint(model)})
        if different:
            raise MixheadError(
                f"{folder} holds images that were drawn in another way ({', '.join(different)}): give another name, or "
                "delete that folder."
            )
    state.wait_for_everyone()
    missing = [batch for batch in _batches(state, len(files), config) if not all(files[i].is_file() for i in batch)]
    pipeline.to(state.device)
    drawn, wanted = 0, sum(map(len, missing))
    for batch in missing:
        progress = _part(on_progress, drawn, len(batch), wanted)
        images = sample_images(
            pipeline, classes[batch.start : batch.stop], config, first=batch.start, on_progress=progress
        )
        for number, image in zip(batch, torch.cat(list(images)), strict=True):
            write_png(image, files[number])
        drawn += len(batch)
    state.wait_for_everyone()
    return files if state.is_main_process else []


def fingerprint(model: Path) -> dict[str, Any]:
    """Which model it is, and when its weights were written."""
    written = [path.stat().st_mtime_ns for path in model.rglob("*.safetensors")]
    return {"model": str(model.resolve()), "written": max(written, default=0)}


def _batches(state: Any, samples: int, config: SamplingConfig) -> list[range]:
    """Numbers of the samples that this process draws, batch by batch; batches hold whole groups."""
    size = -(-config.batch_size // config.group) * config.group
    batches = [range(start, min(start + size, samples)) for start in range(0, samples, size)]
    return batches[state.process_index :: state.num_processes]


def _part(on_progress: OnProgress, before: int, images: int, all_images: int) -> OnProgress:
    """Progress within a batch as progress in images of the whole, so that a bar moves while a batch is drawn."""
    return lambda done, total: on_progress(before + images * done // total, all_images)


def write_grid(files: Sequence[Path], path: Path, columns: int | None = None) -> None:
    """The first 400 images side by side."""
    shown = [read_image(file) for file in files[:GRID]]
    tiles = torch.stack([square(image, image.height, 3) for image in shown])
    write_png(grid(tiles, columns), path)
