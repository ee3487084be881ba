"""A task of one's own: settings, a trainer that says what a step costs, `build`, `measure`, a line in the table."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset, default_collate

from mixhead.cli.app import run
from mixhead.settings import Count
from mixhead.tasks.registry import TASKS, train_recipe
from mixhead.training.config import RunConfig
from mixhead.training.recipes import Recipe
from mixhead.training.run import Task
from mixhead.training.trainer import PartOfStep, RunTrainer, Samples


@dataclass(frozen=True, kw_only=True)
class LineConfig(RunConfig):
    steps: Count = 40
    batch_size: Count = 4


class LineTrainer(RunTrainer[LineConfig]):
    columns = ("loss", "largest_error")
    unit = "points"

    def __init__(self, config, run):
        torch.manual_seed(config.seed)
        x = torch.linspace(-1, 1, 16).unsqueeze(1)
        samples = Samples(
            dataset=lambda length: TensorDataset(x.repeat(length // 16 + 1, 1), 3 * x.repeat(length // 16 + 1, 1)),
            collate=lambda points: dict(zip(("x", "y"), default_collate(points), strict=True)),
            steps=lambda per_step: config.steps,
            batch_size=config.batch_size,
        )
        super().__init__(nn.Linear(1, 1), config, samples, run)

    def part_of_step(self, model, inputs, targets):
        error, share = model(inputs["x"]) - inputs["y"], self.equal_share
        return PartOfStep(error.square().mean() * share, share, {"largest_error": error.abs().max() * share})

    def write_model(self, folder: Path) -> None:
        save_file(self.model.state_dict(), folder / "model.safetensors")


def measure(trainer, folder):
    assert (folder / "model.safetensors").is_file()
    return {"slope": trainer.model.weight.item()}


@pytest.fixture(autouse=True)
def one_line(monkeypatch):
    monkeypatch.setitem(TASKS, "line", Task(LineConfig, LineTrainer, measure))


SETTINGS = {"learning_rate": 0.3, "precision": "float32", "save_every": 10}


def losses(folder: Path) -> list[str]:
    return [row.split(",")[2] for row in (folder / "log.csv").read_text().splitlines()]


def test_it_trains_is_measured_and_leaves_a_recipe_that_runs_again(tmp_path, monkeypatch, capsys):
    result = train_recipe(Recipe("line", "line", SETTINGS), tmp_path / "run")
    assert result.metrics["slope"] == pytest.approx(3, abs=0.3) and result.resumed_from == 0
    assert losses(tmp_path / "run")[0] == "loss" and len(losses(tmp_path / "run")) == 41
    monkeypatch.chdir(tmp_path)
    assert run(["train", "run/recipe.yaml"]) == 0
    assert "slope" in capsys.readouterr().out
    assert losses(Path("runs/recipe")) == losses(tmp_path / "run")


def test_it_is_stopped_and_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    train_recipe(Recipe("line", "line", SETTINGS), tmp_path / "whole")
    finish = LineTrainer.finish_step

    def stop(self):
        self.interrupted = self.state.global_step == 16
        return finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(LineTrainer, "finish_step", stop)
        with pytest.raises(KeyboardInterrupt, match="after step 17 of 40"):
            train_recipe(Recipe("line", "line", SETTINGS), tmp_path / "run")
    # Its own recipe finds the folder.
    assert run(["train", str(tmp_path / "run" / "recipe.yaml"), "--resume"]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_micro_batches_add_up_to_the_step(tmp_path):
    parts = {**SETTINGS, "batch_size": 2, "gradient_accumulation": 2}
    for name, settings in (("whole", SETTINGS), ("parts", parts)):
        train_recipe(Recipe("line", "line", settings), tmp_path / name)
    whole, cut = ([float(loss) for loss in losses(tmp_path / name)[1:]] for name in ("whole", "parts"))
    assert cut == pytest.approx(whole, rel=1e-3)


def test_unknown_tasks_are_told_from_known_ones(capsys, tmp_path):
    (tmp_path / "game.yaml").write_text("# A game\ntask: game\n")
    assert run(["train", str(tmp_path / "game.yaml")]) == 2
    assert "choose one of class_conditional_generation" in " ".join(capsys.readouterr().err.split())
