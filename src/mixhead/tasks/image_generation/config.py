"""`GenerationConfig`: how a diffusion model is trained, and on what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from mixhead.data.labelled_images import NAMED
from mixhead.errors import MixheadError
from mixhead.settings import Count, NotNegative, Positive, Settings, Share, Source
from mixhead.training.config import Precision, RunConfig, Schedule

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class DataSettings(Settings):
    """What is trained on.

    Attributes:
        images: "fashion-mnist", "emoji", or a folder with one folder of images per class.
        size: side of the images in pixels.
        channels: 1 (grey) or 3 (colour).
        mirror: whether half of the images are mirrored.
        vae: local folder of the VAE (AutoencoderKL of diffusers) whose latents are modelled; None models pixels.
        latents: folder in which the latents are kept.
    """

    images: Annotated[str, Source(NAMED)]
    size: Count
    channels: int = 3
    mirror: bool = True
    vae: Annotated[str | None, Source()] = None
    latents: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.vae is None) != (self.latents is None):
            raise MixheadError("vae and latents belong together: give both, or neither to train on pixels.")
        if self.vae is not None and self.channels != 3:
            raise MixheadError(f"channels={self.channels}: a VAE takes colour images, so it must be 3.")
        if self.latents is not None:  # the folder need not be there yet
            object.__setattr__(self, "latents", str(Path(self.latents).absolute()))


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(RunConfig):
    """How a diffusion model is trained; the defaults are the published ones (arXiv 2410.11842, section 4.2).

    See `RunConfig` for what is not listed here.

    Attributes:
        data: what is trained on.
        model: fields of `MoHDiTConfig`; `name` begins with a published configuration. Size, channels and classes follow
            from the data.
        steps: optimizer steps.
        batch_size: images of one process in one micro-batch.
        ema_decay: of the running average of the weights, which sampling uses. The average begins faster, so that the
            first steps are forgotten.
        prediction_type: what the model learns to predict, "epsilon" (the noise), "v_prediction" or "sample"
            (the image); see `GaussianDiffusion`.
        class_dropout: share of the samples that lose their class, for guidance.
        balance_coefficient: weight of the balance loss.
    """

    data: DataSettings
    model: dict[str, Any]
    steps: Count = 400_000
    batch_size: Count = 256
    learning_rate: Positive = 1e-4
    schedule: Schedule = "warmup_stable_decay"
    max_grad_norm: Annotated[float, Ge(0)] = math.inf
    ema_decay: Share = 0.9999
    prediction_type: PredictionType = "epsilon"
    class_dropout: Share = 0.1
    balance_coefficient: NotNegative = 0.01
    precision: Precision = "float32"
    save_every: Count = 50_000
