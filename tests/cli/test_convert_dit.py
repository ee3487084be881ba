"""`mixhead convert` with diffusion transformers: published files, folders of diffusers, calibration on images."""

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed")

import numpy as np
import torch
from PIL import Image

from mixhead.cli.app import run
from mixhead.interop.dit import official_names
from mixhead.models.moh_dit import (
    PUBLISHED,
    MoHDiT,
    MoHDiTConfig,
    MoHDiTPipeline,
    MoHDiTTransformer2DModel,
    ancestral_scheduler,
    load_dit,
)

DENSE = {"hidden_size": 24, "depth": 2, "num_heads": 4}
PIXELS = {"sample_size": 8, "in_channels": 3, "num_classes": 2}


@pytest.fixture
def small_is_tiny(monkeypatch):
    """The published models are too large for a test: tiny ones take two of their names."""
    monkeypatch.setitem(PUBLISHED, "dit-s", DENSE)
    monkeypatch.setitem(PUBLISHED, "moh-dit-s-75", {**DENSE, "shared_heads": 2, "top_k": 1})


@pytest.fixture
def images(tmp_path):
    """Six pictures of each of two classes."""
    random = np.random.default_rng(0)
    for name in ("dark", "light"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(6):
            pixels = random.integers(0, 128, (8, 8, 3)) + 127 * (name == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def published_file(path, name, **sizes):
    model = MoHDiT(MoHDiTConfig.named(name, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    weights = official_names(model.state_dict())
    torch.save({"model": weights, "ema": weights}, path)
    return model


def said(capsys):
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).split())


def test_a_published_checkpoint_becomes_a_pipeline(small_is_tiny, tmp_path, capsys):
    file, out = tmp_path / "7000000.pt", tmp_path / "out"
    model = published_file(file, "moh-dit-s-75", **PIXELS)
    assert run(["convert", str(file), str(out)]) == 0
    assert "a diffusion transformer, 75.0% of its heads per token" in said(capsys)
    x, t, y = torch.randn(1, 3, 8, 8), torch.tensor([9]), torch.tensor([1])
    torch.testing.assert_close(load_dit(out)(x, t, y), model(x, t, y), rtol=0, atol=1e-6)
    pipeline = MoHDiTPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline([1], num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)
    assert run(["convert", str(file), str(out)]) == 2  # never overwritten unasked
    assert run(["convert", str(file), str(out), "--overwrite"]) == 0


def test_a_dense_model_is_calibrated_on_images(small_is_tiny, images, tmp_path, capsys):
    file, out = tmp_path / "dense.pt", tmp_path / "out"
    published_file(file, "dit-s", **PIXELS)
    assert run(["convert", str(file), str(tmp_path / "dense")]) == 0
    assert "It is dense: --images" in said(capsys)
    arguments = [str(tmp_path / "dense"), str(out), "--active", "0.75", "--images", str(images), "--samples", "10"]
    assert run(["convert", *arguments]) == 0
    assert "Calibrated on 160 tokens: 75.0% of all heads per token" in said(capsys)
    config = load_dit(out).config
    assert config.router == "linear"
    assert config.active_share == 0.75
    assert run(["convert", str(out), str(tmp_path / "again"), "--images", str(images)]) == 2
    assert "is mixture-of-head already" in said(capsys)


@pytest.mark.parametrize(
    ("sizes", "options", "sentence"),
    [
        ({"num_classes": 3}, [], "The images have 2 classes, but the model was trained on 3"),
        ({"in_channels": 4}, [], "has 4 channels, so it works on latents: name the folder of its VAE"),
        ({}, ["--vae", "absent"], "absent is no folder of a VAE"),
        ({}, ["--official", "moh-dit-s-75"], "fit none of these configurations: moh-dit-s-75"),
        ({}, ["--official", "dit-z"], "The configuration 'dit-z' is unknown"),
    ],
)
def test_what_does_not_fit(small_is_tiny, images, tmp_path, capsys, sizes, options, sentence):
    file = tmp_path / "w.pt"
    published_file(file, "dit-s", **{**PIXELS, **sizes})
    assert run(["convert", str(file), str(tmp_path / "out"), "--images", str(images), *options]) == 2
    assert sentence in said(capsys)
    assert not (tmp_path / "out").exists()


def test_names_of_classes_and_scheduler_are_kept(tmp_path):
    model = MoHDiTTransformer2DModel.from_dit(MoHDiT(MoHDiTConfig(**DENSE, **PIXELS)))
    source = MoHDiTPipeline(model, ancestral_scheduler(clip_sample=True), id2label={0: "dark", 1: "light"})
    source.save_pretrained(tmp_path / "in")
    assert run(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    pipeline = MoHDiTPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.class_numbers(["light"]) == [1]
    assert pipeline.scheduler.config.clip_sample
