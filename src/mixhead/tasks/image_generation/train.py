"""Class-conditional image generation: trains a MoH-DiT, or the dense DiT of the same sizes, by a recipe.

On pixels, or on the latents of a VAE in a local folder, which are encoded once and kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import set_seed

from mixhead.data.latents import cache_latents, load_vae
from mixhead.data.noised_images import TrainingInputs, generation_images, pixel_inputs
from mixhead.errors import MixheadError
from mixhead.files import write_folder
from mixhead.models.moh_dit import PUBLISHED, MoHDiT, MoHDiTConfig
from mixhead.tasks.image_generation.diffusion import GaussianDiffusion
from mixhead.tasks.image_generation.trainer import DiffusionTrainer, TrainingSettings
from mixhead.training.progress import last_tenth
from mixhead.training.recipes import Recipe, settings_from
from mixhead.training.run import LOG, open_run, run_training
from mixhead.training.trainer import TrainingResult

if TYPE_CHECKING:
    from mixhead.models.moh_dit import MoHDiTPipeline

MANIFEST = "run.json"
# Fields of a model that follow from the data.
FROM_DATA = ("sample_size", "in_channels", "num_classes")


@dataclass(frozen=True)
class DataSettings:
    """What is trained on.

    Attributes:
        images: "fashion-mnist", "emoji", or a folder with one folder of images per class.
        size: side of the images in pixels.
        channels: 1 (grey) or 3 (colour).
        mirror: whether half of the images are mirrored.
        vae: local folder of the VAE (AutoencoderKL of diffusers) whose latents are modelled; None models pixels.
        latents: folder in which the latents are kept.
    """

    images: str
    size: int
    channels: int = 3
    mirror: bool = True
    vae: str | None = None
    latents: str | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise MixheadError(f"size={self.size} must be a positive number of pixels.")
        if (self.vae is None) != (self.latents is None):
            raise MixheadError("vae and latents belong together: give both, or neither to train on pixels.")
        if self.vae is not None and self.channels != 3:
            raise MixheadError(f"channels={self.channels}: a VAE takes colour images, so it must be 3.")


@dataclass(frozen=True)
class GenerationSettings:
    """The recipe of a run.

    Attributes:
        data: what is trained on.
        model: fields of `MoHDiTConfig`; `name` begins with a published configuration. Size, channels and classes follow
            from the data.
        training: how it is trained.
    """

    data: DataSettings
    model: dict[str, Any]
    training: TrainingSettings = field(default_factory=TrainingSettings)


def train(recipe: Recipe, run: Path, *, resume: bool = False) -> TrainingResult:
    """Trains by a recipe; the result holds the averaged weights, ready for `mixhead sample`.

    Args:
        recipe: see `GenerationSettings`.
        run: folder of the run.
        resume: continues the run in the folder.

    Raises:
        MixheadError: where the recipe asks for what cannot be, the loss becomes NaN, or the disk is full. The
            checkpoints that were complete stay.
        KeyboardInterrupt: after Ctrl-C, when the running step has ended and a checkpoint is written.
    """
    from mixhead.models.moh_dit import ancestral_scheduler

    settings = settings_from(GenerationSettings, recipe.values)
    inputs = training_inputs(settings.data)
    config = model_config(settings.model, inputs)
    predicted = settings.training.prediction_type
    scheduler = ancestral_scheduler(
        clip_sample=settings.data.vae is None, prediction_type=predicted, learn_sigma=config.learn_sigma
    )
    set_seed(settings.training.seed)
    model = MoHDiT(config)
    trainer = DiffusionTrainer(model, GaussianDiffusion(scheduler.betas, predicted), inputs, settings.training, run)
    done = open_run(trainer, MANIFEST, {"task": recipe.task, **recipe.values}, resume)
    seconds = run_training(trainer, done, "Training")
    trainer.average.copy_to(model)
    folder = run / "model"
    if trainer.accelerator.is_main_process:
        pipeline = finished_pipeline(model.eval(), scheduler, settings.data, inputs.classes)
        write_folder(folder, pipeline.save_pretrained)
    trainer.accelerator.wait_for_everyone()
    return TrainingResult(folder, {**final_losses(run), "active heads": config.active_share, "seconds": seconds})


def training_inputs(data: DataSettings) -> TrainingInputs:
    """Pixels, or cached latents."""
    pixels = pixel_inputs(generation_images(data.images), data.size, data.channels, data.mirror)
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


def finished_pipeline(model: MoHDiT, scheduler: Any, data: DataSettings, classes: Sequence[str]) -> MoHDiTPipeline:
    """The trained model with all that drawing from it takes."""
    from mixhead.models.moh_dit import MoHDiTPipeline, MoHDiTTransformer2DModel

    vae = None if data.vae is None else load_vae(Path(data.vae))
    network = MoHDiTTransformer2DModel.from_dit(model)
    return MoHDiTPipeline(network, scheduler, vae, dict(enumerate(classes)))


def final_losses(run: Path) -> dict[str, float]:
    """Means of the losses over the last tenth of the steps."""
    last = last_tenth(run / LOG)
    names = [name for name in ("noise", "bound", "balance") if last[0].get(name)]
    return {name: sum(float(row[name]) for row in last) / len(last) for name in names}
