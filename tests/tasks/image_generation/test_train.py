"""A tiny generator from the recipe to the picture: trained, interrupted, resumed, drawn from, measured."""

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed")

import csv
import json
import math
import subprocess
import sys

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from mixhead.cli.app import run
from mixhead.data.labelled_images import open_images
from mixhead.data.latents import cache_latents, load_vae, shard_file
from mixhead.data.noised_images import NoisedOrder, NoisingConfig, pixel_inputs, to_eight_bits, to_signed
from mixhead.errors import MixheadError
from mixhead.models.moh_dit import MoHDiT, load_dit
from mixhead.tasks.image_generation.config import GenerationConfig
from mixhead.tasks.image_generation.drawing import image_batches
from mixhead.tasks.image_generation.sampling import class_number, load_pipeline, sample_images
from mixhead.tasks.image_generation.sampling_config import SamplingConfig
from mixhead.tasks.image_generation.trainer import DiffusionTrainer
from mixhead.tasks.registry import settings_of, train_recipe
from mixhead.training.recipes import Recipe, read_recipe, shipped_recipes

SIDE = 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes: dark images and bright ones, brighter to the right."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name, base in (("dark night", 0), ("bright day", 120)):
        (folder / name).mkdir()
        for number in range(5):
            slope = np.arange(SIDE) * 10
            pixels = base + slope + random.integers(0, 40, (SIDE, SIDE))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


def recipe(pictures, **training):
    settings = {"steps": 4, "batch_size": 3, "save_every": 2, "learning_rate": 1e-3, "ema_decay": 0.5, **training}
    return Recipe(
        "tiny",
        "class_conditional_generation",
        {
            "data": {"images": str(pictures), "size": SIDE, "channels": 1},
            "model": {
                "patch_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 4, "shared_heads": [2, 4], "top_k": [1, 0],
            },
            **settings,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """The folder of a run that is complete."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    result = train_recipe(recipe(pictures), folder)
    assert result.folder == folder / "model"
    return folder


def log_of(folder):
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


# Training


def test_training_writes_all_parts_of_the_loss(trained):
    rows = log_of(trained)
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    for row in rows:
        parts = float(row["noise"]) + float(row["bound"]) + 0.01 * float(row["balance"])
        assert float(row["loss"]) == pytest.approx(parts, rel=1e-5)
        assert float(row["learning_rate"]) == 1e-3


@pytest.mark.parametrize(("cooldown", "rates"), [(0.5, [1e-3, 1e-3, 1e-3, 5e-4]), (0.99, [1e-3, 7.5e-4, 5e-4, 2.5e-4])])
def test_the_learning_rate_falls_at_the_end(pictures, tmp_path, cooldown, rates):
    train_recipe(recipe(pictures, cooldown=cooldown), tmp_path / "run")
    assert [float(row["learning_rate"]) for row in log_of(tmp_path / "run")] == pytest.approx(rates)


def test_what_is_saved_are_the_averaged_weights(trained):
    saved = load_dit(trained / "model").state_dict()
    last = torch.load(trained / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert last["param_groups"][0]["weight_decay"] == 0
    average = load_file(trained / "checkpoint-4" / "ema.safetensors")
    weights = load_file(trained / "checkpoint-4" / "model.safetensors")
    torch.testing.assert_close(saved["final.proj.weight"], average["final.proj.weight"])
    assert not torch.equal(saved["final.proj.weight"], weights["network.final.proj.weight"])


def test_a_resumed_run_ends_where_an_unbroken_one_does(trained, pictures, tmp_path, monkeypatch):
    run_folder = tmp_path / "run"
    stopped = {"after": 2}

    def stop(self, *arguments, **keywords):
        if stopped["after"] == 0:
            self.interrupted = True
        stopped["after"] -= 1
        return original(self, *arguments, **keywords)

    original = DiffusionTrainer.compute_loss
    monkeypatch.setattr(DiffusionTrainer, "compute_loss", stop)
    with pytest.raises(KeyboardInterrupt, match="checkpoint-3"):
        train_recipe(recipe(pictures), run_folder)
    with pytest.raises(MixheadError, match="holds a run already"):
        train_recipe(recipe(pictures), run_folder)
    with pytest.raises(MixheadError, match="batch_size was 3 and is 4"):
        train_recipe(recipe(pictures, batch_size=4), run_folder, resume=True)
    train_recipe(recipe(pictures), run_folder, resume=True)
    for ours, unbroken in zip(log_of(run_folder), log_of(trained), strict=True):
        assert ours["loss"] == unbroken["loss"]
    ours, unbroken = (load_dit(folder / "model").state_dict() for folder in (run_folder, trained))
    assert all(torch.equal(ours[name], unbroken[name]) for name in unbroken)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(pictures, tmp_path, monkeypatch):
    original = MoHDiT.forward
    calls = iter(range(100))

    def broken(self, *arguments, **keywords):
        output, routings = original(self, *arguments, **keywords)
        return (output * math.nan if next(calls) == 3 else output), routings

    monkeypatch.setattr(MoHDiT, "forward", broken)
    with pytest.raises(MixheadError, match=r"loss became nan at step 4.*checkpoint-2 is complete"):
        train_recipe(recipe(pictures), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-2" / "ema.safetensors").is_file()
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("part", "values", "sentence"),
    [
        ("data", {"size": 0}, "size=0 must be at least 1"),
        ("data", {"size": 10}, "multiple of patch_size"),
        ("data", {"channels": 2}, "must be 1"),
        ("data", {"vae": "vae"}, "belong together"),
        ("data", {"vae": "vae", "latents": "latents"}, "takes colour images"),
        ("data", {"images": "nowhere"}, "does not exist"),
        ("model", {"num_classes": 3}, "follow from the data"),
        ("model", {"widht": 3}, "unknown fields: widht"),
        ("model", {"name": "moh-dit-s-90", "widht": 3}, "unknown fields: widht"),
        ("model", {"name": "moh-dit-s-91"}, "choose one of moh-dit-s-90"),
        (None, {"class_dropout": 1.0}, "less than 1"),
        (None, {"steps": 0}, "at least 1"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(pictures, tmp_path, part, values, sentence):
    asked = recipe(pictures)
    (asked.values if part is None else asked.values[part]).update(values)
    with pytest.raises(MixheadError, match=sentence):
        train_recipe(asked, tmp_path / "run")


def test_the_shipped_recipes_are_complete():
    names = [name for name in shipped_recipes() if "dit" in name]
    assert len(names) == 10
    for name in names:
        read = read_recipe(name)
        settings = settings_of(read)
        assert read.task == "class_conditional_generation"
        assert settings.class_dropout == 0.1
    published = settings_of(read_recipe("moh-dit-xl-90"))
    assert published == GenerationConfig(
        data=published.data, model=published.model, steps=7_000_000, batch_size=32, dataloader_workers=4
    )


# Samples


def test_a_sample_depends_on_seed_and_number_alone(pictures):
    inputs = pixel_inputs(open_images(pictures), SIDE, 1, mirrors=True)
    order = NoisedOrder(inputs, 100, NoisingConfig(steps=1000, class_dropout=0.5, seed=1))
    again = NoisedOrder(inputs, 200, NoisingConfig(steps=1000, class_dropout=0.5, seed=1))
    other = NoisedOrder(inputs, 100, NoisingConfig(steps=1000, class_dropout=0.5, seed=2))
    for number in (0, 57, 99, 3):
        ours, theirs = order[number], again[number]
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert not torch.equal(ours["noise"], other[number]["noise"])
    first_round = [order.images[number] for number in range(10)]
    assert sorted(first_round) == list(range(10))
    dropped = sum(int(order[number]["y"]) == 2 for number in range(100))
    assert 30 < dropped < 70
    assert {float(order[n]["image"].mean() < 0) for n in range(20)} == {0.0, 1.0}


def test_pixels_survive_the_way_to_floats_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_eight_bits(to_signed(values)), values)


# Latents


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(4, 4),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder)
    return folder


def test_latents_are_encoded_once_and_trained_on(pictures, vae, tmp_path):
    asked = recipe(pictures, steps=2)
    asked.values["data"].update(channels=3, vae=str(vae), latents=str(tmp_path / "latents"))
    asked.values["model"]["patch_size"] = 2
    result = train_recipe(asked, tmp_path / "run")
    written = shard_file(tmp_path / "latents", 0).stat().st_mtime_ns
    pipeline = load_pipeline(result.folder)
    assert pipeline.transformer.dit.config.in_channels == 4
    assert pipeline.transformer.dit.config.sample_size == SIDE // 2
    [images] = sample_images(pipeline, [0, 1], SamplingConfig(steps=2))
    assert images.shape == (2, 3, SIDE, SIDE)
    inputs = pixel_inputs(open_images(pictures), SIDE, 3, mirrors=True)
    latents = cache_latents(inputs, load_vae(vae), tmp_path / "latents")
    assert shard_file(tmp_path / "latents", 0).stat().st_mtime_ns == written
    draws = [latents.read(3, True, torch.Generator().manual_seed(seed)) for seed in range(200)]
    distribution = load_vae(vae).encode(to_signed(inputs.eight_bits(3)).flip(-1).unsqueeze(0)).latent_dist
    torch.testing.assert_close(torch.stack(draws).mean(0) / 0.18215, distribution.mean[0], rtol=0.2, atol=0.3)
    with pytest.raises(MixheadError, match="belong to other images"):
        cache_latents(pixel_inputs(open_images(pictures), SIDE, 3), load_vae(vae), tmp_path / "latents")


def test_a_missing_vae_is_named(tmp_path):
    with pytest.raises(MixheadError, match="no folder of a VAE"):
        load_vae(tmp_path)


# Drawing


@pytest.mark.parametrize("sampler", ["ddim", "dpm", "ancestral"])
def test_images_depend_on_seed_and_number_alone(trained, sampler):
    pipeline = load_pipeline(trained)
    torch.manual_seed(0)
    for parameter in pipeline.transformer.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)

    def draw(count, batch_size, seed=0, first=0):
        config = SamplingConfig(steps=3, guidance=1.5, sampler=sampler, seed=seed, batch_size=batch_size)
        classes = [i % 2 for i in range(first, count)]
        return torch.cat(list(sample_images(pipeline, classes, config, first=first)))

    at_once = draw(11, 64)
    assert torch.equal(at_once, draw(11, 1))
    assert torch.equal(at_once[:6], draw(6, 5))
    assert torch.equal(at_once[8:], draw(11, 4, first=8))
    assert not torch.equal(at_once, draw(11, 64, seed=1))
    assert at_once.dtype == torch.uint8


def test_a_model_of_the_image_without_variance(pictures, tmp_path):
    settings = recipe(pictures, prediction_type="sample").values
    settings["model"]["learn_sigma"] = False
    train_recipe(Recipe("tiny", "class_conditional_generation", settings), tmp_path / "run")
    assert {row["bound"] for row in log_of(tmp_path / "run")} == {""}
    pipeline = load_pipeline(tmp_path / "run")
    assert pipeline.transformer.config.out_channels == 1
    for sampler in ("ddim", "dpm", "ancestral"):
        config = SamplingConfig(steps=3, guidance=1.5, sampler=sampler)
        [images] = sample_images(pipeline, [0, 1], config)
        assert images.shape == (2, 1, SIDE, SIDE)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"steps": 0}, "at least 1 is needed"),
        ({"guidance": 0.0}, "between 1"),
        ({"guidance": 1e9}, "between 1"),
        ({"guidance": math.nan}, "between 1"),
        ({"sampler": "euler"}, "choose one of ddim, dpm, ancestral"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_drawing_that_cannot_be_is_refused(values, sentence):
    with pytest.raises(MixheadError, match=sentence):
        SamplingConfig(**values)


def test_more_steps_than_were_trained_are_refused(trained):
    with pytest.raises(MixheadError, match="exceeds the 1000 steps"):
        list(sample_images(load_pipeline(trained), [0], SamplingConfig(steps=1001)))


def test_classes_are_found_by_number_and_name():
    names = ("tench, Tinca tinca", "goldfish", "great white shark")
    assert class_number(names, "2") == 2
    assert class_number(names, "Tinca Tinca") == 0
    assert class_number(names, " GOLDFISH ") == 1
    for wanted, sentence in (
        ("3", "out of range"),
        ("-1", "out of range"),
        ("goldfisch", r"did you mean 'goldfish' \(1\)"),
        ("shark", r"'great white shark' \(2\)"),
        ("xylophone", "the model knows tench"),
    ):
        with pytest.raises(MixheadError, match=sentence):
            class_number(names, wanted)


def test_another_vae_must_fit(trained, vae):
    with pytest.raises(MixheadError, match="do not belong together"):
        load_pipeline(trained, vae)


# The command line


def test_train_sample_and_evaluate_from_the_command_line(trained, pictures, tmp_path, capsys):
    out = tmp_path / "grid.png"
    command = ["sample", str(trained), "--class", "Dark Night", "--class", "0", "--n", "6", "--steps", "2"]
    command += ["-o", str(out)]
    assert run(command) == 0
    files = sorted(path.name for path in (tmp_path / "grid").glob("*.png"))
    assert files[:2] == ["000000-dark-night.png", "000001-bright-day.png"]
    assert len(files) == 6
    first = out.read_bytes()
    (tmp_path / "grid" / files[5]).unlink()  # what an interrupted call had not drawn yet
    out.unlink()
    assert run([*command, "--batch-size", "1"]) == 0
    assert out.read_bytes() == first
    assert run([*command, "--seed", "1"]) == 2
    assert "drawn in another way (seed)" in " ".join(capsys.readouterr().err.split())
    for wrong, sentence in (
        (["--class", "7"], "out of range"),
        (["--class", "dark nigth"], "did you mean 'dark night'"),
        (["--guidance", "0"], "guidance=0.0"),
        (["--steps", "0"], "steps=0"),
    ):
        assert run(["sample", str(trained), *wrong, "-o", str(tmp_path / "x.png")]) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x.png").exists()
    assert run(["sample", str(tmp_path), "-o", str(tmp_path / "x.png")]) == 2


def in_two_processes(*command):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "--", "mixhead.cli"]
    subprocess.run([*launch, *command], check=True, capture_output=True, timeout=300)


@pytest.mark.distributed
def test_two_processes_train_as_one_with_twice_the_batch(pictures, tmp_path):
    file = tmp_path / "tiny.yaml"
    one = recipe(pictures, batch_size=4, steps=3, save_every=3)
    file.write_text(yaml.safe_dump({"task": one.task, **one.values}))
    train_recipe(one, tmp_path / "one")
    in_two_processes("train", str(file), "batch_size=2", "--run", str(tmp_path / "two"))
    for ours, theirs in zip(log_of(tmp_path / "two"), log_of(tmp_path / "one"), strict=True):
        assert float(ours["noise"]) == pytest.approx(float(theirs["noise"]), rel=1e-4)
        assert ours["images"] == theirs["images"]


@pytest.mark.distributed
def test_two_processes_draw_the_images_of_one(trained, tmp_path):
    command = ["sample", str(trained), "--n", "11", "--steps", "2", "--batch-size", "4", "-o"]
    assert run([*command, str(tmp_path / "one.png")]) == 0
    in_two_processes(*command, str(tmp_path / "two.png"))
    ours, theirs = (sorted((tmp_path / name).glob("*.png")) for name in ("one", "two"))
    assert len(ours) == 11
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_small_classifier_measures_samples(trained, pictures, tmp_path, capsys):
    values = {"images": str(pictures), "size": SIDE, "channels": 1, "widths": [8, 8], "epochs": 20, "batch_size": 5}
    result = train_recipe(Recipe("small", "small_classifier", values), tmp_path / "features")
    assert result.metrics["accuracy"] > 0.8
    report = tmp_path / "quality.json"
    command = ["evaluate-samples", str(pictures), "--reference", str(pictures), "--features", str(result.folder)]
    assert run([*command, "--json", str(report)]) == 0
    quality = json.loads(report.read_text())
    assert quality["fid"] == pytest.approx(0, abs=1e-6)
    assert quality["precision"] == quality["recall"] == 1.0
    assert "small classifier of" in quality["extractor"]
    assert "small classifier of" in " ".join(capsys.readouterr().out.split())


def test_samples_must_be_of_one_size(tmp_path):
    for number, side in enumerate((8, 9)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{number}.png")
    with pytest.raises(MixheadError, match=r"9 x 9 pixels, but the first one of the folder has 8 x 8"):
        list(image_batches(tmp_path))
    with pytest.raises(MixheadError, match="holds no image"):
        (tmp_path / "empty").mkdir()
        list(image_batches(tmp_path / "empty"))
