"""Sampling images of a class with the schedulers of diffusers, in the latents of a VAE or in pixels.

Shape legend: B images, Y and X rows and columns.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.models.moh_dit.diffusion import MoHDiTTransformer2DModel
from mixhead.models.moh_dit.modeling import MoHDiT, check_classes

Generators = torch.Generator | list[torch.Generator] | None
OnStep = Callable[[int, int], None]

LEARNED = ("learned", "learned_range")


def ancestral_scheduler(
    *, clip_sample: bool = False, prediction_type: str = "epsilon", learn_sigma: bool = True
) -> DDPMScheduler:
    """The scheduler of the paper, sampled with 250 of its 1,000 steps; the model's own variance.

    Args:
        clip_sample: whether the predicted image is kept within [-1, 1]: for pixels, not for latents.
        prediction_type: what the model predicts: "epsilon" (the noise), "v_prediction" or "sample" (the image).
        learn_sigma: whether the model predicts the variance; else it is the smallest possible.
    """
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        variance_type="learned_range" if learn_sigma else "fixed_small",
        clip_sample=clip_sample,
        prediction_type=prediction_type,
        timestep_spacing="linspace",
    )


class MoHDiTPipeline(DiffusionPipeline):
    """Images of given classes from a MoH-DiT.

    Unlike diffusers' `DiTPipeline`, which takes the model as well, this one knows models with other classes than
    ImageNet's, needs no VAE, hands the predicted variance to schedulers that use it, and guides only the first three
    channels, as the published sampler does.

    Args:
        transformer: the model.
        scheduler: of diffusers: DDIM, DPM-Solver++, `ancestral_scheduler()`…
        vae: decodes latents; None where the model's output is the image.
        id2label: names of the classes; several for one class are separated by commas.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(
        self,
        transformer: MoHDiTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict[int, str] | None = None,
    ) -> None:
        super().__init__()
        channels = transformer.config.in_channels
        if vae is not None and vae.config.latent_channels != channels:
            raise MixheadError(
                f"The VAE has {vae.config.latent_channels} latent channels, but the model was made for {channels}: "
                "they do not belong together."
            )
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label)

    def class_numbers(self, class_labels: Sequence[int | str]) -> list[int]:
        """Classes by number or name as numbers; raises where one is unknown."""
        names = {
            name.strip(): int(number)
            for number, label in (self.config.id2label or {}).items()
            for name in label.split(",")
        }
        unknown = [label for label in class_labels if isinstance(label, str) and label not in names]
        if unknown:
            known = ", ".join(list(names)[:12]) + ("…" if len(names) > 12 else "")
            raise MixheadError(f"The class {unknown[0]!r} is unknown: the model knows {known or 'numbers only'}.")
        numbers = [names[label] if isinstance(label, str) else int(label) for label in class_labels]
        check_classes(numbers, self.transformer.dit.config)
        return numbers

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str],
        guidance_scale: float = 1.0,
        generator: Generators = None,
        num_inference_steps: int = 250,
        output_type: str = "pil",
        return_dict: bool = True,
        on_step: OnStep | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples one image for each class.

        Args:
            class_labels: numbers or names.
            guidance_scale: strength of classifier-free guidance; 1 is none, and half the work.
            generator: one for all images, or one for each, which makes an image independent of its batch.
            num_inference_steps: steps of the scheduler.
            output_type: "pil", "np" ([B, Y, X, channels] in [0, 1]) or "pt" ([B, channels, Y, X] in [0, 1]).
            return_dict: False for a plain tuple.
            on_step: called with (steps done, all steps); without it, diffusers' progress bar is shown.

        Raises:
            MixheadError: where a class is unknown, or steps or guidance cannot be.
        """
        config = self.transformer.dit.config
        numbers = self.class_numbers(class_labels)
        if isinstance(generator, list) and len(generator) != len(numbers):
            raise MixheadError(f"Give one generator, or one for each of the {len(numbers)} images.")
        x = randn_tensor(
            (len(numbers), config.in_channels, config.sample_size, config.sample_size),
            generator=generator,
            device=self._execution_device,
            dtype=self.transformer.dtype,
        )
        if on_step is None:
            with self.progress_bar(total=num_inference_steps) as bar:
                x = self.denoise(x, numbers, guidance_scale, num_inference_steps, generator, lambda *_: bar.update())
        else:
            x = self.denoise(x, numbers, guidance_scale, num_inference_steps, generator, on_step)
        if self.vae is not None:
            x = self.vae.decode(x / self.vae.config.scaling_factor).sample
        images: Any = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def denoise(
        self, x: Tensor, classes: list[int], guidance_scale: float, steps: int, generator: Generators, on_step: OnStep
    ) -> Tensor:
        """From noise to the image, or its latents."""
        return denoise(self.transformer.dit, self.scheduler, x, classes, guidance_scale, steps, generator, on_step)


@torch.no_grad()
def denoise(
    dit: MoHDiT,
    scheduler: SchedulerMixin,
    x: Tensor,
    classes: Sequence[int],
    guidance_scale: float = 1.0,
    num_inference_steps: int = 250,
    generator: Generators = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """From noise to images or latents, [B, in_channels, sample_size, sample_size].

    Args:
        dit: the network.
        scheduler: of diffusers.
        x: noise of standard deviation 1.
        classes: a class number for each image.
        guidance_scale: strength of classifier-free guidance; 1 is none.
        num_inference_steps: steps of the scheduler.
        generator: for schedulers that add noise; one for all images, or one for each.
        on_step: called with (steps done, all steps).

    Raises:
        MixheadError: where a class, the guidance or the number of steps cannot be, or the sample becomes NaN.
    """
    check_sampling(dit, scheduler, guidance_scale, num_inference_steps)
    check_classes(list(classes), dit.config)
    guides = guidance_scale != 1.0
    y_B = torch.tensor(classes, device=x.device)
    if guides:
        y_B = torch.cat([y_B, torch.full_like(y_B, dit.config.num_classes)])
    keywords = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    scheduler.set_timesteps(num_inference_steps, device=x.device)
    x = x * scheduler.init_noise_sigma
    for done, t in enumerate(scheduler.timesteps, 1):
        scaled = scheduler.scale_model_input(x, t)
        if guides:
            output = dit.forward_with_cfg(torch.cat([scaled, scaled]), t, y_B, guidance_scale)[: len(x)]
        else:
            output = dit(scaled, t, y_B)
        if not uses_variance(scheduler):
            output = output[:, : dit.config.in_channels]
        x = scheduler.step(output, t, x, **keywords).prev_sample
        if on_step is not None:
            on_step(done, len(scheduler.timesteps))
    if not torch.isfinite(x).all():
        raise MixheadError(
            f"The sample became NaN or infinite: guidance_scale={guidance_scale} may be too large, or the weights are "
            "broken."
        )
    return x


def check_sampling(dit: MoHDiT, scheduler: SchedulerMixin, guidance_scale: float, num_inference_steps: int) -> None:
    """Raises for what cannot be sampled."""
    if num_inference_steps < 1:
        raise MixheadError(f"num_inference_steps={num_inference_steps} must be at least 1.")
    trained = scheduler.config.num_train_timesteps
    if num_inference_steps > trained:
        raise MixheadError(f"num_inference_steps={num_inference_steps} exceeds the {trained} steps of the training.")
    if not 0.0 <= guidance_scale < math.inf:
        raise MixheadError(f"guidance_scale={guidance_scale} must be 0 or a positive number; 1 is no guidance.")
    if guidance_scale != 1.0 and not dit.config.null_class:
        raise MixheadError("This model has no null class, so it cannot be guided: set guidance_scale to 1.")
    learned = scheduler.config.get("variance_type") in LEARNED
    if learned and not uses_variance(scheduler) and dit.config.in_channels != 3:
        raise MixheadError(
            f"With a learned variance, {type(scheduler).__name__} takes three channels of the output for the noise, "
            f"but this model has {dit.config.in_channels}: set its variance_type to None, for it samples without one."
        )
    if uses_variance(scheduler) and not dit.config.learn_sigma:
        raise MixheadError(
            "The scheduler wants a learned variance, but this model predicts none: choose one with a fixed "
            "variance_type."
        )


def uses_variance(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler samples with the model's variance, and so is given all channels."""
    return isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type in LEARNED
