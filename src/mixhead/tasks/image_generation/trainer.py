"""A diffusion model on the trainer of every run: its loss, and a running average of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import TrainerCallback, TrainerControl, TrainerState

from mixhead.data.latents import load_vae
from mixhead.data.noised_images import NoisedOrder, NoisingConfig, TrainingInputs
from mixhead.models.moh_dit import MoHDiT
from mixhead.models.moh_dit.modeling import rename_former_weights
from mixhead.routing import Routing
from mixhead.tasks.image_generation.config import GenerationConfig
from mixhead.tasks.image_generation.diffusion import GaussianDiffusion
from mixhead.training.checkpoints import damaged, step_of
from mixhead.training.health import HEALTH
from mixhead.training.trainer import PartOfStep, RunTrainer, Samples

EMA_WEIGHTS = "ema.safetensors"


class Denoiser(nn.Module):
    """A network as the Trainer takes it: without `config`, which the Trainer writes into and which is frozen here."""

    def __init__(self, network: MoHDiT) -> None:
        super().__init__()
        self.network = network

    def forward(self, noised_BCYX: Tensor, t_B: Tensor, y_B: Tensor) -> tuple[Tensor, tuple[Routing, ...]]:
        return self.network(noised_BCYX, t_B, y_B, return_routing=True)


class DiffusionTrainer(RunTrainer[GenerationConfig]):
    """Trains a MoH-DiT or a dense DiT, and averages its weights after every step.

    Args:
        model: trained in place.
        scheduler: of diffusers, whose noise is learned; saved beside the model.
        inputs: images or latents.
        config: how to train.
        run: folder of the run.
    """

    columns = ("loss", "noise", "bound", *HEALTH)
    unit = "images"

    def __init__(
        self, model: MoHDiT, scheduler: Any, inputs: TrainingInputs, config: GenerationConfig, run: Path
    ) -> None:
        self.network, self.scheduler, self.classes = model, scheduler, inputs.classes
        self.diffusion = GaussianDiffusion(scheduler)
        model.gradient_checkpointing = config.gradient_checkpointing
        noising = NoisingConfig(len(self.diffusion), config.class_dropout, config.seed)
        samples = Samples(
            dataset=lambda length: NoisedOrder(inputs, length, noising),
            collate=default_collate,
            steps=lambda per_step: config.steps,
            batch_size=config.batch_size,
        )
        super().__init__(Denoiser(model), config, samples, run, activation_checkpointing=False)
        self.average = WeightAverage(model, config.ema_decay)
        self.add_callback(self.average)

    def part_of_step(self, model: nn.Module, inputs: dict[str, Any], targets: Tensor | int | None) -> PartOfStep:
        """The error of the noise, and the bound on the variance."""
        del targets
        image, noise, t_B, y_B = inputs["image"], inputs["noise"], inputs["t"], inputs["y"]
        noised = self.diffusion.add_noise(image, noise, t_B)
        output, routings = model(noised, t_B, y_B)
        losses = self.diffusion.losses(image, noise, output, t_B)
        share = self.equal_share
        log = {"noise": losses.noise * share}
        if losses.bound is not None:
            log["bound"] = losses.bound * share
        return PartOfStep(losses.total * share, share, log, routings, self.config.balance_coefficient)

    def write_model(self, folder: Path) -> None:
        """The averaged weights with all that drawing from them takes."""
        from mixhead.models.moh_dit import MoHDiTPipeline, MoHDiTTransformer2DModel

        self.average.copy_to(self.network)
        vae = None if self.config.data.vae is None else load_vae(Path(self.config.data.vae))
        network = MoHDiTTransformer2DModel.from_dit(self.network.eval())
        MoHDiTPipeline(network, self.scheduler, vae, dict(enumerate(self.classes))).save_pretrained(folder)

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
