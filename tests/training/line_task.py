"""A task as small as one can be: a line is fitted to points."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset, default_collate

from mixhead.settings import Count
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


LINE = Task(LineConfig, LineTrainer, measure)
SETTINGS = {"learning_rate": 0.3, "precision": "float32", "save_every": 10}


def losses(folder: Path) -> list[str]:
    return [row.split(",")[2] for row in (folder / "log.csv").read_text().splitlines()]


def line(**changes: object) -> Recipe:
    return Recipe("line", "line", {**SETTINGS, **changes})
