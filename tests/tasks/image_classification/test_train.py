"""Training image classifiers: schedule, targets, decay, resuming; evaluation and single images of what was trained."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import mixhead
from mixhead.errors import MixheadError
from mixhead.models.moh_vit import MoHTransNeXtForImageClassification
from mixhead.routing import OneStageRouter
from mixhead.tasks.image_classification.config import ImageTrainConfig
from mixhead.tasks.image_classification.distiller import normed_distance
from mixhead.tasks.image_classification.train import build, starting_model
from mixhead.tasks.image_classification.trainer import Evaluations, ImageTrainer, image_side
from mixhead.tasks.registry import settings_of, train_recipe
from mixhead.training.optimizer import timm_cosine
from mixhead.training.recipes import Recipe, read_recipe, shipped_recipes

SIZES = {
    "image_size": 16, "patch_size": 4, "hidden_sizes": [8, 16], "num_heads": [2, 4], "depths": [1, 1],
    "mlp_ratios": [2, 2], "pool_ratios": [2, 1], "shared_heads": [1, 1], "top_k": [1, 2],
}  # fmt: skip
COLOURS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain colours, eight images of each to train on and two to evaluate on."""
    folder = tmp_path_factory.mktemp("colours")
    for split, count in (("train", 8), ("val", 2)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (20, 18), tuple(c + number for c in colour)).save(
                    folder / split / name / f"{number}.png"
                )
    return folder


def recipe(folder: Path, **changes: object) -> Recipe:
    values = {
        "data": str(folder), "model": SIZES, "epochs": 2, "batch_size": 6, "warmup": 0.25, "learning_rate": 0.01,
        "precision": "float32", "save_every": 0.5, "evaluate_every": 1,
    }  # fmt: skip
    return Recipe("colours", "image_classification", {**values, **changes})


def losses(run: Path) -> list[str]:
    lines = (run / "log.csv").read_text().splitlines()
    column = lines[0].split(",").index("loss")
    return [line.split(",")[column] for line in lines[1:]]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended."""
    run = tmp_path_factory.mktemp("run")
    result = train_recipe(recipe(data), run / "a")
    assert result.metrics["test images"] == 6
    assert result.metrics["heads used (%)"] == pytest.approx(100 * 5 / 6, abs=0.01)
    return result.folder.parent


def test_the_log_has_the_health_of_the_routing(trained: Path):
    head, first, *_ = (trained / "log.csv").read_text().splitlines()
    row = dict(zip(head.split(","), first.split(","), strict=True))
    assert float(row["cross_entropy"]) < float(row["loss"]), "the balance loss is added"
    assert float(row["loss"]) == pytest.approx(float(row["cross_entropy"]) + 0.01 * float(row["balance"]), abs=1e-5)
    assert 0 <= float(row["smallest_load"]) <= float(row["largest_load"]) <= 1
    assert row["images"] == "6"


def test_checkpoints_are_measured(trained: Path):
    rows = [line.split(",") for line in (trained / "evaluations.csv").read_text().splitlines()]
    assert [row[:2] for row in rows] == [["step", "images"], ["4", "6"], ["8", "6"]]
    assert all(0 <= float(top1) <= float(top5) == 1 for _, _, top1, top5 in rows[1:])


def test_the_folder_loads_with_class_names_and_processor(trained: Path):
    model = mixhead.load(trained / "model")
    assert isinstance(model, MoHTransNeXtForImageClassification)
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert (trained / "model" / "preprocessor_config.json").is_file()


def test_a_run_goes_on_as_if_it_had_not_been_stopped(data: Path, trained: Path, tmp_path: Path, monkeypatch):
    def stop(trainer: ImageTrainer, *arguments: object, **names: object) -> object:
        trainer.interrupted = trainer.state.global_step == 4
        return compute_loss(trainer, *arguments, **names)

    compute_loss = ImageTrainer.compute_loss
    with monkeypatch.context() as patched:
        patched.setattr(ImageTrainer, "compute_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            train_recipe(recipe(data), tmp_path / "run")
    train_recipe(recipe(data), tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(trained)
    assert (tmp_path / "run" / "evaluations.csv").read_text() == (trained / "evaluations.csv").read_text()
    with pytest.raises(MixheadError, match="holds a run already"):
        train_recipe(recipe(data), tmp_path / "run")
    with pytest.raises(MixheadError, match=r"epochs was 2\.0 and is 3\.0"):
        train_recipe(recipe(data, epochs=3), tmp_path / "run", resume=True)


@pytest.mark.parametrize("step", [4, 8])
def test_a_run_killed_between_a_checkpoint_and_its_measurement_loses_no_row(data, trained, tmp_path, monkeypatch, step):
    measure = Evaluations.measure

    def killed(self, at):
        if at == step:
            raise RuntimeError("killed")
        measure(self, at)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluations, "measure", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train_recipe(recipe(data), tmp_path / "run")
    assert train_recipe(recipe(data), tmp_path / "run", resume=True).resumed_from == step
    assert losses(tmp_path / "run") == losses(trained)
    assert (tmp_path / "run" / "evaluations.csv").read_text() == (trained / "evaluations.csv").read_text()


def test_micro_batches_add_up_to_the_batch(data: Path, tmp_path: Path):
    still = {"crop_scale": [1, 1], "flip": 0, "randaugment_magnitude": 0, "color_jitter": 0, "erasing": 0, "mix": 0}
    settings = {"epochs": 0.5, "warmup": 0.5, "augmentation": still}
    train_recipe(recipe(data, **settings), tmp_path / "whole")
    train_recipe(recipe(data, **settings, batch_size=2, gradient_accumulation=3), tmp_path / "parts")
    whole, parts = (torch.tensor([float(x) for x in losses(tmp_path / name)]) for name in ("whole", "parts"))
    torch.testing.assert_close(whole, parts, rtol=2e-3, atol=0)  # the balance loss is not linear in the batch


def test_a_dense_model_trains_without_routing(data: Path, tmp_path: Path):
    dense = {name: value for name, value in SIZES.items() if name not in ("shared_heads", "top_k")}
    result = train_recipe(recipe(data, model=dense, epochs=0.5, warmup=0), tmp_path / "run")
    assert result.metrics["heads used (%)"] == 100


def test_a_converted_vit_trains_on(data: Path, tmp_path: Path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    labels = {"id2label": {0: "blue", 1: "green", 2: "red"}, "label2id": {"blue": 0, "green": 1, "red": 2}}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, **labels))
    mixhead.convert(model, mixhead.MoHConfig(active_heads=3))
    mixhead.save(model, ViTImageProcessorPil(size={"height": 16, "width": 16}), tmp_path / "start")
    changed = {"model": {"folder": str(tmp_path / "start")}, "epochs": 0.5, "warmup": 0}
    result = train_recipe(recipe(data, **changed), tmp_path / "run")
    assert result.metrics["heads used (%)"] == 75
    assert "smallest_load" in (tmp_path / "run" / "log.csv").read_text()
    with pytest.raises(MixheadError, match="leave out all other settings"):
        train_recipe(recipe(data, model={"folder": "x", "depths": [1]}), tmp_path / "other")


def test_a_converted_vit_keeps_the_hidden_states_of_its_teacher(data: Path, tmp_path: Path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    labels = {"id2label": {0: "blue", 1: "green", 2: "red"}, "label2id": {"blue": 0, "green": 1, "red": 2}}
    torch.manual_seed(0)
    dense = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, **labels))
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    mixhead.save(dense, processor, tmp_path / "dense")
    mixhead.save(mixhead.convert(dense, mixhead.MoHConfig(active_heads=2)), processor, tmp_path / "start")
    changed = {
        "model": {"folder": str(tmp_path / "start")}, "teacher": str(tmp_path / "dense"), "epochs": 6,
        "evaluate_every": 0, "weight_decay": 0,
    }  # fmt: skip
    train_recipe(recipe(data, **changed), tmp_path / "run")
    header, *rows = (line.split(",") for line in (tmp_path / "run" / "log.csv").read_text().splitlines())
    distances = [float(row[header.index("distance")]) for row in rows]
    assert sum(distances[-4:]) < 0.7 * sum(distances[:4])
    start, end = (mixhead.load(tmp_path / name) for name in ("start", "run/model"))
    torch.testing.assert_close(end.classifier.weight, start.classifier.weight, rtol=0, atol=0)
    with pytest.raises(MixheadError, match="the dense model that the student was converted from"):
        normed_distance(torch.zeros(1, 5, 16), torch.zeros(1, 5, 8))


def test_routers_decay_and_biases_do_not(data: Path, tmp_path: Path):
    config = settings_of(recipe(data))
    trainer = build(config, tmp_path)
    model = trainer.base_model
    assert image_side(trainer.processor) == 16
    decays = {
        id(p): group["weight_decay"] for group in trainer.create_optimizer().param_groups for p in group["params"]
    }
    by_name = {name: decays[id(parameter)] for name, parameter in model.named_parameters()}
    assert {by_name[name] for name in by_name if "moh_router" in name} == {0.05}
    for exempt in ("proj.bias", "norm1.weight", "position_bias", "local_bias", "temperature", "query_embedding"):
        assert {by_name[name] for name in by_name if exempt in name} == {0.0}


def test_the_published_schedule():
    def share(step: int) -> float:
        return timm_cosine(step, ImageTrainConfig(model={}, data=""), 300_000)

    assert share(0) == pytest.approx(1e-3)  # 1e-6 of 1e-3
    assert share(2_500) == pytest.approx(0.5, abs=1e-3)
    assert share(150_000) == pytest.approx(0.505, abs=1e-3)
    assert share(299_999) == pytest.approx(0.01)


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith(("moh-vit", "transnext"))])
def test_shipped_recipes_can_be_used(name: str):
    config = settings_of(read_recipe(name))
    with torch.device("meta"):
        model, _processor = starting_model(config, tuple("abcdefghij"))
    shares = {"75": 0.75, "50": 0.5, "80": 0.8, "shared": 0.75, "stage": 0.75, "fashion": 0.75}
    wanted = 1.0 if name.startswith("transnext") else shares[name.split("-")[-1]]
    assert model.config.active_share == pytest.approx(wanted, abs=0.005)
    if "fashion" not in name:
        assert (config.epochs, config.learning_rate, config.weight_decay) == (300, 1e-3, 0.05)
        assert config.warmup == pytest.approx(5 / 300, abs=1e-6)
        assert config.augmentation == replace(
            ImageTrainConfig(model={}, data="").augmentation, crop_aspect=(0.75, 1.3333)
        )
    assert any(isinstance(module, OneStageRouter) for module in model.modules()) is ("one-stage" in name)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": {**SIZES, "depth": 3}}, "unknown key model.depth"),
        ({"epochs": 0.1}, "too short for one optimizer step"),
        ({"warmup": 1}, "warmup=1 must be less than 1"),
        ({"fsdp": True, "evaluate_every": 0}, "needs GPUs"),
        ({"fsdp": True}, "With fsdp it must be 0"),
        ({"evaluate_every": 0.7}, "must be a multiple of save_every"),
        ({"final_learning_rate": 1.0}, "final_learning_rate"),
        ({"augmentation": {"flip": 2}}, "flip"),
        ({"data": "nowhere"}, "does not exist"),
    ],
)
def test_what_cannot_be_trained_is_refused(data: Path, tmp_path: Path, changes: dict, why: str):
    with pytest.raises(MixheadError, match=why):
        train_recipe(recipe(data, **changes), tmp_path / "run")


def test_damaged_images_are_refused_before_the_run_or_skipped_in_it(data: Path, tmp_path: Path):
    shutil.copytree(data, tmp_path / "data")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "red" / "0.png").write_text("no picture")
    with pytest.raises(MixheadError, match=r"1 of 24 images cannot be read.*red/0\.png"):
        train_recipe(recipe(tmp_path / "data"), tmp_path / "run")
    skipping = recipe(tmp_path / "data", unreadable="skip", epochs=0.5, warmup=0)
    assert train_recipe(skipping, tmp_path / "run").metrics["test images"] == 5
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["unreadable"] == "skip"


TWO_PROCESSES = """
import sys
from mixhead.cli.app import run
sys.exit(run(["train", {recipe!r}, "batch_size=3", "--run", {folder!r}]))
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_train_as_one(data: Path, tmp_path: Path):
    # Mixing depends on the batch, so that it is left out.
    still = {"color_jitter": 0, "randaugment_magnitude": 0, "mix": 0}
    asked = recipe(data, epochs=0.5, warmup=0.5, augmentation=still)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"task": asked.task, **asked.values}))
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES.format(recipe=str(tmp_path / "recipe.yaml"), folder=str(tmp_path / "two")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    train_recipe(asked, tmp_path / "one")
    one, two = (torch.tensor([float(x) for x in losses(tmp_path / name)]) for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=0)  # the balance loss is not linear in the batch
    assert mixhead.load(tmp_path / "two" / "model").config.id2label[0] == "blue"
