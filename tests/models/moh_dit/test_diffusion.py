"""MoH-DiT among the models of diffusers: its pipelines, its schedulers, its folders."""

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed")

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
)
from safetensors.torch import load_file, save_file

from mixhead.errors import MixheadError
from mixhead.models.moh_dit import (
    MoHDiT,
    MoHDiTConfig,
    MoHDiTPipeline,
    MoHDiTTransformer2DModel,
    ancestral_scheduler,
    denoise,
    load_dit,
)

SIZES = {
    "sample_size": 8, "in_channels": 4, "hidden_size": 48, "depth": 2, "num_heads": (2, 4), "head_dim": 12,
    "shared_heads": (2, 2), "top_k": (0, 1),
}  # fmt: skip


def make(**changes):
    dit = MoHDiT(MoHDiTConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in dit.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    return MoHDiTTransformer2DModel.from_dit(dit)


def tiny_vae(channels=4):
    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(DiffusionPipeline, "_progress_bar_config", {"disable": True}, raising=False)
    diffusers.utils.logging.set_verbosity_error()


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_the_pipeline_of_diffusers_samples(scheduler):
    pipeline = DiTPipeline(make(), tiny_vae(), scheduler())
    images = pipeline([3, 999], guidance_scale=1.5, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3)


SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "ancestral": ancestral_scheduler,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_our_pipeline_samples_with_and_without_a_vae(name):
    latents = MoHDiTPipeline(make(), SCHEDULERS[name](), tiny_vae())
    assert latents([1], num_inference_steps=3, guidance_scale=1.5, output_type="pt").images.shape == (1, 3, 16, 16)
    pixels = MoHDiTPipeline(make(in_channels=1), SCHEDULERS[name]())
    (images,) = pixels([1, 2], num_inference_steps=3, return_dict=False)
    assert [(image.size, image.mode) for image in images] == [((8, 8), "L")] * 2


def test_ancestral_steps_are_those_of_the_respaced_diffusion():
    """The posterior of the 250-step diffusion (Nichol and Dhariwal, 2021) computed by hand, at one of its steps."""
    scheduler = ancestral_scheduler()
    scheduler.set_timesteps(250)
    kept = torch.linspace(0, 999, 250, dtype=torch.float64).round().long()
    assert scheduler.timesteps.tolist() == kept.flip(0).tolist()
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[kept]
    step = 100
    beta = 1 - alphas[step] / alphas[step - 1]
    x, noise, fraction = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2), torch.rand(1, 4, 2, 2) * 2 - 1
    start = (x - (1 - alphas[step]).sqrt() * noise) / alphas[step].sqrt()
    mean = (alphas[step - 1].sqrt() * beta * start + (1 - beta).sqrt() * (1 - alphas[step - 1]) * x) / (
        1 - alphas[step]
    )
    smallest = beta * (1 - alphas[step - 1]) / (1 - alphas[step])
    log_variance = (fraction + 1) / 2 * beta.log() + (1 - fraction) / 2 * smallest.log()
    expected = mean + (0.5 * log_variance).exp() * torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    taken = scheduler.step(
        torch.cat([noise, fraction], 1), int(kept[step]), x, generator=torch.Generator().manual_seed(7)
    ).prev_sample
    torch.testing.assert_close(taken.double(), expected.double(), rtol=0, atol=1e-4)


def test_own_generators_make_an_image_independent_of_its_batch():
    pipeline = MoHDiTPipeline(make(), ancestral_scheduler())

    def sample(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(list(seeds), 2.0, generators, num_inference_steps=3, output_type="pt").images

    together = sample((5, 6, 7))
    torch.testing.assert_close(sample((6,)), together[1:2], rtol=0, atol=1e-4)
    assert sample((5, 6, 7)).equal(together)


def test_progress_and_class_names():
    pipeline = MoHDiTPipeline(make(num_classes=3), DDIMScheduler(), id2label={0: "shirt, top", 1: "trouser", 2: "bag"})
    assert pipeline.class_numbers(["top", 2, "trouser", 3]) == [0, 2, 1, 3]
    seen = []
    pipeline(["bag"], num_inference_steps=3, output_type="pt", on_step=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_guidance_moves_away_from_the_null_class():
    model = make(num_classes=3, in_channels=1)
    noise = torch.randn(1, 1, 8, 8)
    results = [denoise(model.dit, DDIMScheduler(), noise, [1], scale, 2) for scale in (0.0, 1.0, 4.0)]
    null = denoise(model.dit, DDIMScheduler(), noise, [3], 1.0, 2)
    torch.testing.assert_close(results[0], null)
    assert (results[2] - null).norm() > (results[1] - null).norm() > 0


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"class_labels": [1000]}, None),
        ({"class_labels": [1001]}, "class 1001 is out of range"),
        ({"class_labels": ["tench"]}, "class 'tench' is unknown: the model knows numbers only"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be at least 1"),
        ({"num_inference_steps": 1001}, "exceeds the 1000 steps of the training"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0 must be 0 or a positive number"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf must be"),
        ({"guidance_scale": 1e38}, "became NaN or infinite: guidance_scale=1e[+]38 may be too large"),
        ({"generator": [torch.Generator()] * 2}, "one for each of the 1 images"),
    ],
)
def test_what_cannot_be_sampled(call, sentence):
    pipeline = MoHDiTPipeline(make(), DDIMScheduler(clip_sample=False))
    arguments = {"class_labels": [1], "num_inference_steps": 3, "output_type": "pt", **call}
    if sentence is None:
        pipeline(**arguments)
        return
    with pytest.raises(MixheadError, match=sentence):
        pipeline(**arguments)


def test_parts_that_do_not_belong_together():
    with pytest.raises(MixheadError, match="The VAE has 16 latent channels, but the model was made for 4"):
        MoHDiTPipeline(make(), DDIMScheduler(), tiny_vae(16))
    with pytest.raises(MixheadError, match="wants a learned variance, but this model predicts none"):
        MoHDiTPipeline(make(learn_sigma=False), ancestral_scheduler())([1])
    with pytest.raises(MixheadError, match=r"DPMSolverMultistepScheduler takes three .* set its variance_type"):
        MoHDiTPipeline(make(), DPMSolverMultistepScheduler(variance_type="learned_range"))([1])
    with pytest.raises(MixheadError, match="has no null class, so it cannot be guided"):
        MoHDiTPipeline(make(null_class=False), DDIMScheduler())([1], guidance_scale=2.0)


# ---------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("changes", [{}, {"shared_heads": None, "top_k": None}, {"learn_sigma": False}])
def test_saved_and_loaded(changes, tmp_path):
    model = make(**changes)
    model.save_pretrained(tmp_path / "m")
    MoHDiTPipeline(model, DDIMScheduler()).save_pretrained(tmp_path / "p")
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.tensor([7])
    expected = model(*inputs).sample
    for dit in (load_dit(tmp_path / "m"), load_dit(tmp_path / "p"), MoHDiTPipeline.from_pretrained(tmp_path / "p")):
        dit = getattr(getattr(dit, "transformer", None), "dit", dit)
        assert dit.config == model.dit.config
        torch.testing.assert_close(dit(*inputs), expected, rtol=0, atol=1e-6)


def test_a_folder_of_the_first_version_still_loads(tmp_path):
    """It named the routers of its layers otherwise."""
    model = make()
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    save_file({name.replace(".router.", ".moh_router."): value for name, value in load_file(file).items()}, file)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.tensor([7])
    torch.testing.assert_close(load_dit(tmp_path)(*inputs), model(*inputs).sample, rtol=0, atol=1e-6)


def test_stock_loaders_fail_loudly(tmp_path):
    make().save_pretrained(tmp_path / "m")
    with pytest.raises(NotImplementedError, match="this is a mixhead checkpoint, load it with"):
        DiTTransformer2DModel.from_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="no class `MoHDiTTransformer2DModel`"):
        diffusers.AutoModel.from_pretrained(tmp_path / "m")


def test_a_checkpoint_of_another_size(tmp_path):
    make().save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if k != "dit.blocks.1.mlp.fc1.bias"}, weights)
    with pytest.raises(MixheadError, match=r"fc1\.bias"):
        load_dit(tmp_path / "m")
    save_file({**tensors, "dit.patch_embed.bias": torch.ones(3)}, weights)
    with pytest.raises(MixheadError, match=r"patch_embed\.bias"):
        load_dit(tmp_path / "m")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(MixheadError, match="truncated, corrupt or missing"):
        load_dit(tmp_path / "m")
    weights.unlink()
    with pytest.raises(MixheadError, match="truncated, corrupt or missing"):
        load_dit(tmp_path / "m")
    with pytest.raises(MixheadError, match=r"config\.json is missing"):
        load_dit(tmp_path)


def test_gradient_checkpointing_by_diffusers():
    model = make()
    model.enable_gradient_checkpointing()
    assert model.dit.gradient_checkpointing
    model.train()
    output = model(torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.tensor([7]), output_routing=True)
    output.sample.sum().backward()
    assert [routing.selected_BNH.shape[-1] for routing in output.routing] == [2, 4]
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "routed" not in n)
