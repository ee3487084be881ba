"""Class-conditional image generation: trains a MoH-DiT, or the dense DiT of the same sizes, by a recipe.

On pixels, or on the latents of a VAE in a local folder, which are encoded once and kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import set_seed

from mixhead.data.labelled_images import open_images
from mixhead.data.latents import cache_latents, load_vae
from mixhead.data.noised_images import TrainingInputs, pixel_inputs
from mixhead.errors import MixheadError
from mixhead.models.moh_dit import PUBLISHED, MoHDiT, MoHDiTConfig
from mixhead.tasks.image_generation.config import DataSettings, GenerationConfig
from mixhead.tasks.image_generation.trainer import DiffusionTrainer
from mixhead.training.progress import last_tenth
from mixhead.training.run import LOG, Metrics

# Fields of a model that follow from the data.
FROM_DATA = ("sample_size", "in_channels", "num_classes")


def build(config: GenerationConfig, run: Path) -> DiffusionTrainer:
    """The trainer for a recipe.

    Raises:
        MixheadError: where the recipe asks for what cannot be.
    """
    from mixhead.models.moh_dit import ancestral_scheduler

    inputs = training_inputs(config.data)
    sizes = model_config(config.model, inputs)
    scheduler = ancestral_scheduler(
        clip_sample=config.data.vae is None, prediction_type=config.prediction_type, learn_sigma=sizes.learn_sigma
    )
    set_seed(config.seed)
    return DiffusionTrainer(MoHDiT(sizes), scheduler, inputs, config, run)


def measure(trainer: DiffusionTrainer, folder: Path) -> Metrics:
    """Means of the losses over the last tenth of the steps; `mixhead evaluate-samples` measures pictures."""
    del folder
    last = last_tenth(trainer.run_folder / LOG)
    names = [name for name in ("noise", "bound", "balance") if last[0].get(name)]
    losses = {name: sum(float(row[name]) for row in last) / len(last) for name in names}
    return {**losses, "active heads": trainer.network.config.active_share}


def training_inputs(data: DataSettings) -> TrainingInputs:
    """Pixels, or cached latents."""
    pixels = pixel_inputs(open_images(data.images), data.size, data.channels, data.mirror)
    if data.vae is None or data.latents is None:
        return pixels
    return cache_latents(pixels, load_vae(Path(data.vae)), Path(data.latents))


def model_config(model: Mapping[str, Any], inputs: TrainingInputs) -> MoHDiTConfig:
    """The sizes of the model, for these inputs.

    Raises:
        MixheadError: where the recipe gives what follows from the data, or sizes that do not fit together.
    """
    given = sorted(set(FROM_DATA) & set(model))
    if given:
        raise MixheadError(f"The recipe's model gives {', '.join(given)}, which follow from the data: leave them out.")
    channels, size, _ = inputs.shape
    sizes = {"sample_size": size, "in_channels": channels, "num_classes": len(inputs.classes), "null_class": True}
    fields = dict(model)
    name = fields.pop("name", None)
    if name is not None and name not in PUBLISHED:
        raise MixheadError(f"The model {name!r} is unknown: choose one of {', '.join(PUBLISHED)}, or give its sizes.")
    return MoHDiTConfig.from_dict({**PUBLISHED.get(name, {}), **fields, **sizes})
