"""The `Trainer` of transformers with the loss of a diffusion model and a running average of its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from mixhead.data.noised_images import NoisedOrder, NoisingConfig, TrainingInputs
from mixhead.errors import MixheadError
from mixhead.models.moh_dit import MoHDiT
from mixhead.models.moh_dit.modeling import rename_former_weights
from mixhead.precision import Bf16
from mixhead.routing import Routing, mean_balance_loss
from mixhead.tasks.image_generation.diffusion import GaussianDiffusion, PredictionType
from mixhead.training.checkpoints import damaged, step_of
from mixhead.training.health import HEALTH
from mixhead.training.trainer import RunMixin, training_arguments

EMA_WEIGHTS = "ema.safetensors"


@dataclass(frozen=True)
class TrainingSettings:
    """How a diffusion model is trained; the defaults are the published ones (arXiv 2410.11842, section 4.2).

    Attributes:
        steps: optimizer steps.
        batch_size: images of one process in one micro-batch.
        gradient_accumulation: micro-batches of one optimizer step.
        learning_rate: of AdamW without weight decay; constant between warm-up and cool-down.
        warmup: optimizer steps in which the learning rate rises to that.
        cooldown: optimizer steps at the end in which it falls to 0, at most those after the warm-up; the published
            recipe has none.
        max_grad_norm: to which gradients are clipped; infinity only measures them.
        ema_decay: of the running average of the weights, which sampling uses. The average begins faster, so that the
            first steps are forgotten.
        prediction_type: what the model learns to predict, "epsilon" (the noise), "v_prediction" or "sample"
            (the image); see `GaussianDiffusion`.
        class_dropout: share of the samples that lose their class, for guidance.
        balance_coefficient: weight of the balance loss.
        bf16: whether forward and backward run in bfloat16; "auto" where the machine multiplies it faster.
        gradient_checkpointing: less memory, a third more computation.
        seed: of the weights, the order of the images and their noise.
        save_every: optimizer steps between checkpoints.
        keep_checkpoints: how many of the newest checkpoints stay on the disk.
        dataloader_workers: processes that read images.
    """

    steps: int = 400_000
    batch_size: int = 256
    gradient_accumulation: int = 1
    learning_rate: float = 1e-4
    warmup: int = 0
    cooldown: int = 0
    max_grad_norm: float = math.inf
    ema_decay: float = 0.9999
    prediction_type: PredictionType = "epsilon"
    class_dropout: float = 0.1
    balance_coefficient: float = 0.01
    bf16: Bf16 = False
    gradient_checkpointing: bool = False
    seed: int = 0
    save_every: int = 50_000
    keep_checkpoints: int = 2
    dataloader_workers: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "gradient_accumulation": 1, "save_every": 1, "keep_checkpoints": 1}
        for name, smallest in {**least, "warmup": 0, "cooldown": 0, "seed": 0, "dataloader_workers": 0}.items():
            if getattr(self, name) < smallest:
                raise MixheadError(f"{name}={getattr(self, name)} must be at least {smallest}.")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise MixheadError(f"{name}={getattr(self, name)} must be a positive number.")
        for name in ("ema_decay", "class_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise MixheadError(f"{name}={getattr(self, name)} must be at least 0 and less than 1.")
        if self.prediction_type not in get_args(PredictionType):
            known = ", ".join(get_args(PredictionType))
            raise MixheadError(f"prediction_type={self.prediction_type!r} is unknown: choose one of {known}.")
        if not 0 <= self.balance_coefficient < math.inf:
            raise MixheadError(f"balance_coefficient={self.balance_coefficient} must be a number of at least 0.")

    @property
    def falling_steps(self) -> int:
        """The cool-down, in so far as a training of so many steps has room for it."""
        return min(self.cooldown, max(self.steps - self.warmup, 0))


class Denoiser(nn.Module):
    """A network as the Trainer takes it: without `config`, which the Trainer writes into and which is frozen here."""

    def __init__(self, network: MoHDiT) -> None:
        super().__init__()
        self.network = network

    def forward(self, noised_BCYX: Tensor, t_B: Tensor, y_B: Tensor) -> tuple[Tensor, tuple[Routing, ...]]:
        return self.network(noised_BCYX, t_B, y_B, return_routing=True)


class DiffusionTrainer(RunMixin, Trainer):
    """Trains a MoH-DiT or a dense DiT, and averages its weights after every step.

    Args:
        model: trained in place.
        diffusion: the forward process.
        inputs: images or latents.
        settings: how to train.
        run: folder of the run.
    """

    columns = ("loss", "noise", "bound", *HEALTH)
    unit = "images"

    def __init__(
        self,
        model: MoHDiT,
        diffusion: GaussianDiffusion,
        inputs: TrainingInputs,
        settings: TrainingSettings,
        run: Path,
    ) -> None:
        self.diffusion, self.settings = diffusion, settings
        self.keep_checkpoints, self.bf16 = settings.keep_checkpoints, settings.bf16
        model.gradient_checkpointing = settings.gradient_checkpointing
        arguments = training_arguments(
            run,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": settings.falling_steps, "decay_type": "linear"},
            warmup_steps=settings.warmup,
            weight_decay=0.0,
            max_grad_norm=settings.max_grad_norm,
            save_steps=settings.save_every,
            seed=settings.seed,
            dataloader_num_workers=settings.dataloader_workers,
        )
        self.units_per_step = settings.batch_size * settings.gradient_accumulation * arguments.world_size
        noising = NoisingConfig(len(diffusion), settings.class_dropout, settings.seed)
        order = NoisedOrder(inputs, settings.steps * self.units_per_step, noising)
        super().__init__(model=Denoiser(model), args=arguments, train_dataset=order, data_collator=default_collate)
        self.average = WeightAverage(model, settings.ema_decay)
        self.add_callback(self.average)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The error of the noise, the bound on the variance, and the balance loss of the heads."""
        image, noise, t_B, y_B = inputs["image"], inputs["noise"], inputs["t"], inputs["y"]
        noised = self.diffusion.add_noise(image, noise, t_B)
        output, routings = model(noised, t_B, y_B)
        losses = self.diffusion.losses(image, noise, output, t_B)
        balance = mean_balance_loss(routings)
        loss = losses.total if balance is None else losses.total + self.settings.balance_coefficient * balance
        share = self.equal_share
        self.note(share, loss=loss, noise=losses.noise)
        if losses.bound is not None:
            self.note(share, bound=losses.bound)
        self.note_routings(routings, share)
        return (loss, output) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            assert output_dir is not None
            save_file(self.average.state_dict(), Path(output_dir) / EMA_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        checkpoint = Path(resume_from_checkpoint)
        try:
            weights = load_file(checkpoint / EMA_WEIGHTS)
            rename_former_weights(None, weights)
            self.average.load_state_dict(weights, step_of(checkpoint))
        except (OSError, SafetensorError, RuntimeError, KeyError) as error:
            raise damaged(checkpoint, error) from error


class WeightAverage(TrainerCallback):
    """The running average of a model's weights (`EMAModel` of diffusers), brought up to date after every step."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self.names = [name for name, _ in model.named_parameters()]
        self.model = model
        self.ema = EMAModel(model.parameters(), decay=decay, foreach=True)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.ema.step(self.model.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the names of the model's."""
        return {name: average.contiguous() for name, average in zip(self.names, self.ema.shadow_params, strict=True)}

    @torch.no_grad()
    def load_state_dict(self, weights: dict[str, Tensor], steps: int) -> None:
        """Takes up the average after so many steps."""
        for name, average in zip(self.names, self.ema.shadow_params, strict=True):
            average.copy_(weights[name])
        self.ema.optimization_step = steps

    def copy_to(self, model: nn.Module) -> None:
        """Gives a model the averaged weights."""
        self.ema.copy_to(model.parameters())
