"""Draws images of classes from a trained model: each from its own noise, so that nothing else decides about it.

Shape legend: B batch, C channels, Y rows, X columns.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mixhead.data.latents import load_vae
from mixhead.data.noised_images import to_eight_bits
from mixhead.data.order import SEED_STRIDE
from mixhead.errors import MixheadError, first_line
from mixhead.interop import open_dit
from mixhead.tasks.image_generation.sampling_config import Sampler, SamplingConfig

if TYPE_CHECKING:
    from mixhead.models.moh_dit import MoHDiTPipeline

OnProgress = Callable[[int, int], None]


def load_pipeline(folder: str | Path, vae: str | Path | None = None, name: str | None = None) -> MoHDiTPipeline:
    """What `mixhead train` saved, or any other model that `open_dit` knows, to draw from.

    Args:
        folder: of the model, or of the run that trained it.
        vae: folder of another VAE than the one in the model's folder.
        name: of the published configuration, where a checkpoint's weights do not tell.

    Raises:
        MixheadError: where there is none, a file is damaged, or the VAE does not fit.
    """
    from diffusers import DDPMScheduler

    from mixhead.models.moh_dit import MoHDiTPipeline, MoHDiTTransformer2DModel, ancestral_scheduler

    folder = Path(folder)
    if (folder / "model" / "model_index.json").is_file():
        folder = folder / "model"
    dit = open_dit(folder, name)
    scheduler = ancestral_scheduler()
    labels = None
    if (folder / "model_index.json").is_file():
        try:
            labels = MoHDiTPipeline.load_config(folder, local_files_only=True).get("id2label")
            scheduler = DDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
        except Exception as error:  # diffusers and json raise many types on corrupt files
            raise MixheadError(f"{folder} is no folder of a pipeline ({first_line(error)}).") from error
    inside = folder / "vae"
    decoder = load_vae(Path(vae)) if vae is not None else load_vae(inside) if inside.is_dir() else None
    return MoHDiTPipeline(MoHDiTTransformer2DModel.from_dit(dit), scheduler, decoder, labels)


def class_names(pipeline: MoHDiTPipeline) -> tuple[str, ...]:
    """Names of the classes in order; their numbers where they have none."""
    labels = {int(number): name for number, name in (pipeline.config.id2label or {}).items()}
    return tuple(labels.get(number, str(number)) for number in range(pipeline.transformer.dit.config.num_classes))


def class_number(names: Sequence[str], wanted: str) -> int:
    """The class behind a number or a name.

    Args:
        names: of the model's classes; several for one class are separated by commas.
        wanted: a number, or one of the names in any case.

    Raises:
        MixheadError: where there is no such class; lists names that are near.
    """
    if wanted.lstrip("-").isdigit():
        if not 0 <= int(wanted) < len(names):
            raise MixheadError(
                f"The class {wanted} is out of range: the model knows 0 ({names[0]}) to {len(names) - 1} ({names[-1]})."
            )
        return int(wanted)
    numbers = {part.strip().casefold(): number for number, name in enumerate(names) for part in name.split(",")}
    folded = wanted.strip().casefold()
    if folded in numbers:
        return numbers[folded]
    near = difflib.get_close_matches(folded, numbers, n=5, cutoff=0.5)
    near += [name for name in numbers if folded in name and name not in near][: 5 - len(near)]
    if near:
        hint = f"did you mean {' or '.join(f'{name!r} ({numbers[name]})' for name in near)}?"
    else:
        hint = f"the model knows {', '.join(names[:20])}{' and more' if len(names) > 20 else ''}."
    raise MixheadError(f"The class {wanted!r} is unknown: {hint}")


def sample_images(
    pipeline: MoHDiTPipeline,
    classes: Sequence[int],
    config: SamplingConfig,
    *,
    first: int = 0,
    on_progress: OnProgress = lambda done, total: None,
) -> Iterator[Tensor]:
    """Draws an image of every class in a list.

    Sample i starts from noise that depends on the seed and i alone, and passes through the network in the group that it
    belongs to by its number; so it is the same whatever the batch size, and whichever process draws it.

    Args:
        pipeline: the trained model.
        classes: class of every sample.
        config: how.
        first: number of the first sample, a multiple of `config.group`.
        on_progress: called with (steps of groups done, all).

    Yields:
        Images uint8 [B, C, Y, X] of consecutive samples, `config.batch_size` rounded up to whole groups.

    Raises:
        MixheadError: where a class is out of range, steps or guidance cannot be, or the model makes NaN.
    """
    if first % config.group:
        raise ValueError(f"first={first} must be a multiple of group={config.group}")
    groups = [list(classes[start : start + config.group]) for start in range(0, len(classes), config.group)]
    per_batch = -(-config.batch_size // config.group)
    finished: list[Tensor] = []
    for number, asked in enumerate(groups):
        filled = asked + asked[-1:] * (config.group - len(asked))
        done, total = number * config.steps, len(groups) * config.steps
        on_step = _after(on_progress, done, total)
        images = draw_group(pipeline, filled, config, first + number * config.group, on_step)
        finished.append(images[: len(asked)])
        if len(finished) == per_batch or number == len(groups) - 1:
            yield torch.cat(finished)
            finished = []


def _after(on_progress: OnProgress, done: int, total: int) -> OnProgress:
    return lambda step, steps: on_progress(done + step, total)


@torch.inference_mode()
def draw_group(
    pipeline: MoHDiTPipeline, classes: Sequence[int], config: SamplingConfig, first: int, on_step: OnProgress
) -> Tensor:
    """Images uint8 [B, C, Y, X] of consecutive samples, which pass through the network together."""
    from mixhead.models.moh_dit import denoise

    network = pipeline.transformer.dit
    shape = (network.config.in_channels, network.config.sample_size, network.config.sample_size)
    noises = [torch.Generator().manual_seed(config.seed * SEED_STRIDE**2 + first + i) for i in range(len(classes))]
    start_BCYX = torch.stack([torch.randn(shape, generator=noise) for noise in noises]).to(pipeline.device)
    scheduler = sampling_scheduler(pipeline.scheduler, config.sampler)
    result_BCYX = denoise(
        network, scheduler, start_BCYX, classes, config.guidance, config.steps, generator=noises, on_step=on_step
    )
    if pipeline.vae is not None:
        result_BCYX = pipeline.vae.decode(result_BCYX / pipeline.vae.config.scaling_factor).sample
    return to_eight_bits(result_BCYX).cpu()


def sampling_scheduler(trained: Any, sampler: Sampler) -> Any:
    """The scheduler of diffusers that goes the steps of training back."""
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    if sampler == "ancestral":
        return DDPMScheduler.from_config(trained.config, timestep_spacing="linspace")
    # The others choose the variance themselves.
    settings = {name: value for name, value in trained.config.items() if name != "variance_type"}
    if sampler == "ddim":
        return DDIMScheduler.from_config(settings, timestep_spacing="trailing")
    # The largest of all values as the threshold, and 1 as its limit, keep the predicted image in [-1, 1].
    return DPMSolverMultistepScheduler.from_config(
        settings,
        thresholding=trained.config.clip_sample,
        dynamic_thresholding_ratio=1.0,
        sample_max_value=1.0,
    )


def grid(images_BCYX: Tensor, columns: int | None = None) -> Tensor:
    """Images side by side, uint8 [C, Y, X], with black where there is none."""
    count, channels, height, width = images_BCYX.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    filled = images_BCYX.new_zeros(rows * columns, channels, height, width)
    filled[:count] = images_BCYX
    return (
        filled.view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4).reshape(channels, rows * height, -1)
    )
