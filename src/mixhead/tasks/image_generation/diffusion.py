"""What a denoising diffusion model is trained to minimise: the error of its prediction, and the bound on the variance.

The schedule of the noise is that of a scheduler of diffusers, which also lies beside a saved model for sampling.

Shape legend: B batch, C channels, Y rows, X columns, T diffusion steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PIXEL_STEP = 1 / 127.5  # between two neighbouring values of 8 bits, where they cover [-1, 1]


@dataclass(frozen=True)
class DiffusionLosses:
    """Means over a batch, float32 scalars.

    Attributes:
        noise: squared error of what is predicted.
        bound: variational bound, bits per value; it trains the variance. None where the model predicts none.
    """

    noise: Tensor
    bound: Tensor | None

    @property
    def total(self) -> Tensor:
        """What is minimised, without the balance loss."""
        return self.noise if self.bound is None else self.noise + self.bound


class GaussianDiffusion:
    """The distributions of a scheduler's forward process (Ho et al., arXiv 2006.11239, eqs. 4-7).

    Noise and velocity are the scheduler's own. The moments of a step back and the bound are not in diffusers, whose
    schedulers step for one t and draw: they are here, from tables in float64.

    Args:
        scheduler: of diffusers (`DDPMScheduler`). Its `prediction_type` says what the model predicts: "epsilon", the
            noise, as the published models do; or "v_prediction", the velocity sqrt(a) * noise - sqrt(1 - a) * image
            (Salimans & Ho, arXiv 2202.00512, appendix D), where a is the share of the image's variance that is left:
            short trainings learn coarse shapes sooner from it, for the error of the noise hardly counts them; or
            "sample", the image itself, which passes through fewer channels than a patch with its noise has values.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.prediction_type = scheduler, scheduler.config.prediction_type
        betas_T = scheduler.betas.double()
        self.kept_T = torch.cumprod(1 - betas_T, dim=0)  # share of the image's variance after each step
        kept_before_T = torch.cat([betas_T.new_ones(1), self.kept_T[:-1]])
        variance_T = betas_T * (1 - kept_before_T) / (1 - self.kept_T)
        self.from_image_T = betas_T * kept_before_T.sqrt() / (1 - self.kept_T)
        self.from_noised_T = (1 - kept_before_T) * (1 - betas_T).sqrt() / (1 - self.kept_T)
        # The first step is certain; its variance is taken from the second one, so that it has a logarithm.
        self.log_smallest_T = torch.cat([variance_T[1:2], variance_T[1:]]).log()
        self.log_largest_T = betas_T.log()

    def __len__(self) -> int:
        return len(self.kept_T)

    def add_noise(self, image_BCYX: Tensor, noise_BCYX: Tensor, t_B: Tensor) -> Tensor:
        """The image after step t."""
        noised: Tensor = self.scheduler.add_noise(image_BCYX, noise_BCYX, t_B)
        return noised

    def remove_noise(self, noised_BCYX: Tensor, noise_BCYX: Tensor, t_B: Tensor) -> Tensor:
        """The image that `add_noise` started from."""
        kept = _at(self.kept_T, t_B, noised_BCYX)
        return (noised_BCYX - (1 - kept).sqrt() * noise_BCYX) / kept.sqrt()

    def target(self, image_BCYX: Tensor, noise_BCYX: Tensor, t_B: Tensor) -> Tensor:
        """What the model shall predict."""
        if self.prediction_type == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(image_BCYX, noise_BCYX, t_B)
            return velocity
        return noise_BCYX if self.prediction_type == "epsilon" else image_BCYX

    def noise_of(self, predicted_BCYX: Tensor, noised_BCYX: Tensor, t_B: Tensor) -> Tensor:
        """The noise in a noised image, by what the model predicted."""
        if self.prediction_type == "epsilon":
            return predicted_BCYX
        kept = _at(self.kept_T, t_B, noised_BCYX)
        if self.prediction_type == "sample":
            return (noised_BCYX - kept.sqrt() * predicted_BCYX) / (1 - kept).sqrt()
        return kept.sqrt() * predicted_BCYX + (1 - kept).sqrt() * noised_BCYX

    def step_back(self, image_BCYX: Tensor, noised_BCYX: Tensor, t_B: Tensor) -> Tensor:
        """Mean of the image before step t, given that after it and the clean one."""
        from_image, from_noised = (_at(table, t_B, image_BCYX) for table in (self.from_image_T, self.from_noised_T))
        return from_image * image_BCYX + from_noised * noised_BCYX

    def log_variance(self, share_BCYX: Tensor, t_B: Tensor) -> Tensor:
        """What the model's variance channels mean: -1 is the smallest possible log variance, 1 the largest."""
        share = (share_BCYX + 1) / 2
        smallest, largest = (_at(table, t_B, share_BCYX) for table in (self.log_smallest_T, self.log_largest_T))
        return share * largest + (1 - share) * smallest

    def losses(self, image_BCYX: Tensor, noise_BCYX: Tensor, output_BXYX: Tensor, t_B: Tensor) -> DiffusionLosses:
        """What the model is trained on, as means over a batch.

        Args:
            image_BCYX: images in [-1, 1], or latents, float32.
            noise_BCYX: the noise that `add_noise` added to them.
            output_BXYX: what the model made of the noised images: the prediction, and, where it has as many channels
                again, the variance.
            t_B: diffusion steps from 0, int64.
        """
        output, channels = output_BXYX.float(), image_BCYX.shape[1]
        predicted, share = output[:, :channels], output[:, channels:]
        error = (predicted - self.target(image_BCYX, noise_BCYX, t_B)).square().mean()
        if share.shape[1] == 0:
            return DiffusionLosses(error, None)
        noised = self.add_noise(image_BCYX, noise_BCYX, t_B)
        noise = self.noise_of(predicted, noised, t_B)
        return DiffusionLosses(error, self.bound(image_BCYX, noised, noise, share, t_B).mean())

    def bound(
        self, image_BCYX: Tensor, noised_BCYX: Tensor, noise_BCYX: Tensor, share_BCYX: Tensor, t_B: Tensor
    ) -> Tensor:
        """One term of the variational bound (Nichol & Dhariwal, arXiv 2102.09672, section 3.1), bits per value, [B].

        Where t > 0 the divergence of the model's step back from the true one; at t = 0 the negative log likelihood of
        the image's 8-bit values. Only the variance gets a gradient from it.
        """
        predicted = self.remove_noise(noised_BCYX, noise_BCYX.detach(), t_B)
        mean = self.step_back(predicted, noised_BCYX, t_B)
        log_variance = self.log_variance(share_BCYX, t_B)
        true_mean = self.step_back(image_BCYX, noised_BCYX, t_B)
        true_log_variance = _at(self.log_smallest_T, t_B, image_BCYX)
        divergence_B = gaussian_divergence(true_mean, true_log_variance, mean, log_variance).flatten(1).mean(1)
        decoding_B = -eight_bit_log_likelihood(image_BCYX, mean, log_variance).flatten(1).mean(1)
        return torch.where(t_B == 0, decoding_B, divergence_B) / math.log(2)


def gaussian_divergence(mean_p: Tensor, log_variance_p: Tensor, mean_q: Tensor, log_variance_q: Tensor) -> Tensor:
    """KL(p || q) of two normal distributions, element by element, in nats."""
    ratio = log_variance_p - log_variance_q
    return 0.5 * (ratio.exp() - ratio - 1 + (mean_p - mean_q).square() * (-log_variance_q).exp())


def eight_bit_log_likelihood(value: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability, in nats, that a normal variable rounds to a value of 8 bits in [-1, 1]; the ends are open."""
    deviation = (0.5 * log_variance).exp()
    above = torch.special.ndtr((value + PIXEL_STEP / 2 - mean) / deviation).masked_fill(value > 1 - PIXEL_STEP / 2, 1.0)
    below = torch.special.ndtr((value - PIXEL_STEP / 2 - mean) / deviation).masked_fill(value < PIXEL_STEP / 2 - 1, 0.0)
    return (above - below).clamp(min=1e-12).log()


def _at(table_T: Tensor, t_B: Tensor, like_BCYX: Tensor) -> Tensor:
    """Entries of a table, [B, 1, 1, 1], in the dtype and on the device of another tensor."""
    return table_T.to(like_BCYX.device)[t_B].to(like_BCYX.dtype).view(-1, 1, 1, 1)
