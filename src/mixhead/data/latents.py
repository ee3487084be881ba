"""Latents of images, made once by a VAE and kept on disk: what a latent diffusion model is trained on.

The cache is a folder of shards. Each is written under a temporary name and renamed, so an interrupted encoding goes on
where it was; training reads single latents out of the memory-mapped files.

Shape legend: M images, C channels, Y rows, X columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixhead.data.noised_images import PixelInputs, to_signed
from mixhead.errors import MixheadError, first_line
from mixhead.files import changes_since_begun, write_folder
from mixhead.shards import check_indexes

SHARD = 4096  # images
BATCH = 8
MANIFEST = "latents.json"
VIEWS = ("plain", "mirrored")


@dataclass(frozen=True)
class CachedLatents:
    """Latents of a cache: for every image the distribution that the VAE makes of it, and of its mirror image.

    Attributes:
        folder: of the cache.
        classes: names, in the order of the labels.
        labels_M: the class of every image, int64.
        shape: (C, Y, X) of one latent.
        scaling_factor: latents are multiplied by it, so that their variance is about 1.
        mirrors: whether half of the samples are taken from the mirror images.
    """

    folder: Path
    classes: tuple[str, ...]
    labels_M: Tensor
    shape: tuple[int, int, int]
    scaling_factor: float
    mirrors: bool
    _open: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    def read(self, index: int, mirrored: bool, generator: torch.Generator) -> Tensor:
        """One sample from the latent distribution of an image, scaled, float32 [C, Y, X]."""
        number, place = divmod(index, SHARD)
        mean, deviation = self._shard(number).get_slice(VIEWS[mirrored])[place].float().chunk(2)
        return (mean + deviation * torch.randn(mean.shape, generator=generator)) * self.scaling_factor

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            try:
                self._open[number] = safe_open(shard_file(self.folder, number), framework="pt")
            except (OSError, SafetensorError) as error:
                raise MixheadError(
                    f"The latents in {shard_file(self.folder, number)} cannot be read ({error}): delete that file, and "
                    "the next run makes it again."
                ) from error
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files, which each process of a data loader opens for itself."""
        return {**self.__dict__, "_open": {}}


def shard_file(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:05d}" / "latents.safetensors"


def load_vae(folder: Path) -> Any:
    """A VAE of diffusers from a local folder, frozen.

    Raises:
        MixheadError: where the folder holds none.
    """
    from diffusers import AutoencoderKL

    if not (folder / "config.json").is_file():
        raise MixheadError(f"{folder} is no folder of a VAE (AutoencoderKL of diffusers): it has no config.json.")
    check_indexes(folder)
    try:
        vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except Exception as error:  # diffusers, safetensors and json raise many types on corrupt files
        raise MixheadError(f"The VAE in {folder} cannot be read ({first_line(error)}).") from error
    return vae.eval().requires_grad_(False)


@torch.inference_mode()
def encode(vae: Any, images_BCYX: Tensor) -> Tensor:
    """Images in [-1, 1] to mean and deviation of their latents, float16 [B, 2 C, Y, X]."""
    distribution = vae.encode(images_BCYX.to(vae.device)).latent_dist
    return torch.cat([distribution.mean, distribution.std], dim=1).half().cpu()


def processes() -> PartialState:
    """The processes that work together, and the device of this one."""
    # Said outright: without it several processes on a machine without accelerator would each do everything.
    return PartialState(cpu=not torch.accelerator.is_available())


def cache_latents(
    inputs: PixelInputs,
    vae: Any,
    folder: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> CachedLatents:
    """Encodes what is not in the cache yet, and opens it; several processes share the work.

    Args:
        inputs: the images; RGB.
        vae: see `load_vae`.
        folder: of the cache; one that was made from other images or with another VAE is refused.
        on_progress: called with (images done, all).
    """
    count = len(inputs.labels_M)
    asked = {
        "images": count,
        "size": inputs.size,
        "mirrored": inputs.mirrors,
        "classes": list(inputs.classes),
        "vae": {name: vae.config[name] for name in ("latent_channels", "scaling_factor", "block_out_channels")},
    }
    state = processes()
    if state.is_main_process and changes_since_begun(folder / MANIFEST, asked):
        raise MixheadError(
            f"The latents in {folder} belong to other images or another VAE: give another folder, or delete it."
        )
    state.wait_for_everyone()
    vae.to(state.device)
    for number in range(-(-count // SHARD))[state.process_index :: state.num_processes]:
        indices = range(number * SHARD, min((number + 1) * SHARD, count))
        if not shard_file(folder, number).is_file():
            _write_shard(inputs, vae, shard_file(folder, number), indices)
        on_progress(indices.stop, count)
    state.wait_for_everyone()
    with safe_open(shard_file(folder, 0), framework="pt") as shard:
        _, channels, rows, columns = shard.get_slice(VIEWS[0]).get_shape()
    return CachedLatents(
        folder=folder,
        classes=inputs.classes,
        labels_M=inputs.labels_M,
        shape=(channels // 2, rows, columns),
        scaling_factor=vae.config.scaling_factor,
        mirrors=inputs.mirrors,
    )


def _write_shard(inputs: PixelInputs, vae: Any, path: Path, indices: range) -> None:
    views: dict[str, list[Tensor]] = {name: [] for name in VIEWS[: 1 + inputs.mirrors]}
    for start in range(indices.start, indices.stop, BATCH):
        batch = range(start, min(start + BATCH, indices.stop))
        images = to_signed(torch.stack([inputs.eight_bits(index) for index in batch]))
        for name, latents in views.items():
            latents.append(encode(vae, images.flip(-1) if name == "mirrored" else images))
    tensors = {name: torch.cat(latents).contiguous() for name, latents in views.items()}
    write_folder(path.parent, lambda partial: save_file(tensors, partial / path.name))
