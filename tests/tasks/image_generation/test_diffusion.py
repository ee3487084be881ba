"""The losses of a diffusion model against diffusers' own process and against PyTorch's distributions."""

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed")

import math
from typing import get_args

import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from mixhead.models.moh_dit import ancestral_scheduler
from mixhead.tasks.image_generation.config import PredictionType
from mixhead.tasks.image_generation.diffusion import (
    GaussianDiffusion,
    eight_bit_log_likelihood,
    gaussian_divergence,
)
from mixhead.tasks.image_generation.sampling import sampling_scheduler
from mixhead.tasks.image_generation.sampling_config import Sampler


@pytest.fixture(scope="module")
def scheduler() -> DDPMScheduler:
    return ancestral_scheduler()


@pytest.fixture(scope="module")
def diffusion(scheduler) -> GaussianDiffusion:
    return GaussianDiffusion(scheduler)


def batch(count=4, channels=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image, noise = torch.randn(2, count, channels, 3, 3, generator=generator)
    return image.clamp(-1, 1), noise


def test_noise_that_was_added_can_be_removed(diffusion):
    image, noise = batch()
    t = torch.tensor([0, 1, 500, 999])
    noised = diffusion.add_noise(image, noise, t)
    torch.testing.assert_close(diffusion.remove_noise(noised, noise, t)[:3], image[:3], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("t", [1, 400, 999])
def test_a_step_back_is_the_scheduler_s(scheduler, diffusion, t):
    image, noise = batch()
    t_B = torch.full((4,), t)
    noised = diffusion.add_noise(image, noise, t_B)
    scheduler.set_timesteps(1000)
    smallest = torch.full_like(noise, -1.0)  # the smallest variance
    generator = torch.Generator().manual_seed(0)
    after = scheduler.step(torch.cat([noise, smallest], 1), t, noised, generator=generator).prev_sample
    mean = diffusion.step_back(diffusion.remove_noise(noised, noise, t_B), noised, t_B)
    drawn = torch.randn(noised.shape, generator=torch.Generator().manual_seed(0))
    deviation = (0.5 * diffusion.log_variance(smallest, t_B)).exp()
    torch.testing.assert_close(after, mean + deviation * drawn, rtol=1e-3, atol=2e-3)


def test_the_divergence_is_that_of_normal_distributions():
    means, log_variances = torch.randn(2, 5), torch.randn(2, 5)
    p, q = (Normal(mean, (0.5 * log).exp()) for mean, log in zip(means, log_variances, strict=True))
    ours = gaussian_divergence(means[0], log_variances[0], means[1], log_variances[1])
    torch.testing.assert_close(ours, kl_divergence(p, q), rtol=1e-4, atol=1e-5)


def test_the_probabilities_of_all_values_of_8_bits_sum_to_1():
    values = torch.arange(256) / 127.5 - 1
    log = eight_bit_log_likelihood(values, torch.tensor(0.3), torch.tensor(-4.0))
    torch.testing.assert_close(log.exp().sum(), torch.tensor(1.0), rtol=1e-4, atol=0)


def test_the_bound_is_0_for_the_true_step_and_grows_with_the_error(diffusion):
    image, noise = batch()
    t = torch.tensor([1, 10, 500, 900])
    noised = diffusion.add_noise(image, noise, t)
    smallest = torch.full_like(noise, -1.0)
    exact = diffusion.bound(image, noised, noise, smallest, t)
    torch.testing.assert_close(exact, torch.zeros(4), rtol=0, atol=1e-4)
    assert (diffusion.bound(image, noised, noise + 0.1, smallest, t) > exact).all()


def test_the_first_step_is_measured_in_bits_per_value(diffusion):
    image, noise = batch()
    t = torch.zeros(4, dtype=torch.int64)
    noised = diffusion.add_noise(image, noise, t)
    largest = torch.ones_like(noise)
    mean = diffusion.step_back(diffusion.remove_noise(noised, noise, t), noised, t)
    expected = -eight_bit_log_likelihood(image, mean, diffusion.log_variance(largest, t))
    measured = diffusion.bound(image, noised, noise, largest, t)
    torch.testing.assert_close(measured, expected.flatten(1).mean(1) / math.log(2))


def test_the_bound_trains_the_variance_alone(diffusion):
    image, noise = batch()
    output = torch.randn(4, 4, 3, 3, requires_grad=True)
    losses = diffusion.losses(image, noise, output, torch.tensor([0, 5, 300, 999]))
    assert losses.bound is not None
    torch.testing.assert_close(losses.total, losses.noise + losses.bound)
    losses.bound.backward()
    assert (output.grad[:, :2] == 0).all()
    assert (output.grad[:, 2:] != 0).any()


def test_a_model_without_variance_has_no_bound(diffusion):
    image, noise = batch()
    losses = diffusion.losses(image, noise, noise.clone(), torch.tensor([0, 5, 300, 999]))
    assert losses.bound is None
    assert losses.total == 0


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_a_perfect_prediction_leads_every_sampler_to_the_image(sampler, prediction_type):
    image, noise = batch(channels=3)
    trained = ancestral_scheduler(prediction_type=prediction_type)
    diffusion = GaussianDiffusion(trained)
    scheduler = sampling_scheduler(trained, sampler)
    scheduler.set_timesteps(50)
    x = diffusion.add_noise(image, noise, torch.full((4,), 999))
    for step in scheduler.timesteps:
        kept = trained.alphas_cumprod[int(step)]
        left = (x - kept.sqrt() * image) / (1 - kept).sqrt()
        perfect = diffusion.target(image, left, torch.full((4,), int(step)))
        smallest = torch.full_like(perfect, -1.0)
        output = torch.cat([perfect, smallest], 1) if sampler == "ancestral" else perfect
        x = scheduler.step(output, step, x).prev_sample
    torch.testing.assert_close(x, image, rtol=0, atol=0.02)


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_a_perfect_prediction_has_no_loss(prediction_type):
    image, noise = batch()
    diffusion, t = (
        GaussianDiffusion(ancestral_scheduler(prediction_type=prediction_type)),
        torch.tensor([1, 10, 500, 900]),
    )
    perfect = diffusion.target(image, noise, t)
    losses = diffusion.losses(image, noise, torch.cat([perfect, torch.full_like(noise, -1.0)], 1), t)
    assert losses.noise == 0
    assert losses.bound == pytest.approx(0, abs=1e-4)
    noised = diffusion.add_noise(image, noise, t)
    torch.testing.assert_close(diffusion.noise_of(perfect, noised, t), noise, rtol=1e-3, atol=1e-3)
