"""What the comparisons of MoA with Transformers share: arms and seeds of one recipe, their runs, the page of results.

A run stands in RUNS/ARM-SEED; its result.json says that it is complete. After each run the page and its numbers are
written anew from all runs that are.
"""

import argparse
import datetime
import json
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from mixhead.bench.compute import forward_macs
from mixhead.files import write_text
from mixhead.models.moa import MoAConfig
from mixhead.models.moa.modeling import MoAPreTrainedModel
from mixhead.ops.crossover import cpu_model
from mixhead.tasks.registry import train_recipe
from mixhead.training.recipes import Recipe, read_recipe

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
DENSE = {"active_heads": None, "head_dim": 32, "noisy": False}
Row = dict[str, Any]


class Comparison(ABC):
    """One recipe, trained with several kinds of attention.

    Attributes:
        title: of the page.
        name: of the script and of the files of results.
        recipe: name of the recipe of all arms.
        arms: by name, what is different in the recipe's `model`.
        packages: whose versions matter.
    """

    title: str
    name: str
    recipe: str
    arms: ClassVar[dict[str, dict[str, Any]]]
    packages: Sequence[str] = ("torch", "transformers")

    def model(self, arm: str, model: Row) -> Row:
        """The `model` of an arm, from that of the recipe."""
        return {**model, **self.arms[arm]}

    @abstractmethod
    def count(self, arm: str, recipe: Recipe) -> Row:
        """What does not depend on the training: `name` and `size_of` the model."""

    @abstractmethod
    def columns(self, metrics: Row) -> list[str]:
        """Heads of the table, given the metrics of any run."""

    @abstractmethod
    def cells(self, rows: list[Row]) -> list[str]:
        """A line of the table, from the runs of one arm."""

    @abstractmethod
    def data(self, metrics: Row) -> str:
        """What every run was trained and tested on."""

    @abstractmethod
    def notes(self, metrics: Row) -> list[str]:
        """How the numbers were counted."""

    def run(self, arm: str, seed: int, folder: Path, overrides: list[str]) -> None:
        """Trains one arm, or goes on with it, unless it is complete."""
        done = folder / "result.json"
        if done.is_file():
            return
        recipe = read_recipe(self.recipe, [*overrides, f"seed={seed}"])
        values = {**recipe.values, "model": self.model(arm, recipe.values["model"])}
        recipe = Recipe(recipe.name, recipe.task, values)
        result = train_recipe(recipe, folder, resume=True)
        row = {
            "arm": arm,
            "seed": seed,
            **self.count(arm, recipe),
            "steps": values["steps"],
            "metrics": dict(result.metrics),
            "date": datetime.date.today().isoformat(),
        }
        write_text(done, json.dumps(row, indent=1) + "\n")

    def table(self, rows: list[Row]) -> str:
        """Mean and spread of every arm, and how they were made."""
        metrics = rows[0]["metrics"]
        columns = self.columns(metrics)
        lines = [columns, ["---" if column in ("arm", "model") else "---:" for column in columns]]
        for arm in self.arms:
            of_arm = [row for row in rows if row["arm"] == arm]
            if of_arm:
                lines.append(self.cells(of_arm))
        planned = len(SEEDS) * len(self.arms)
        missing = planned - len(rows)
        minutes = mean(row["metrics"]["training seconds"] / 60 for row in rows)
        notes = [
            *([f"**Incomplete: {missing} of {planned} runs are still to be made.**"] if missing > 0 else []),
            f"{len(rows)} runs of {rows[0]['steps']} steps, {', '.join(sorted({row['date'] for row in rows}))}; "
            f"{self.data(metrics)}; training took {minutes} minutes a run beside other work.",
            f"{', '.join(f'{package} {version(package)}' for package in self.packages)}; {cpu_model()}, one thread.",
            *self.notes(metrics),
            "± is the standard deviation over seeds, no band of the mean.",
        ]
        return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *(f"- {note}" for note in notes)]) + "\n"

    def main(self, description: str | None) -> None:
        """The command line."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("overrides", nargs="*", help="values of the recipe, for a shorter trial")
        parser.add_argument("--runs", type=Path, default=Path("runs") / self.name)
        parser.add_argument("--results", type=Path, default=RESULTS)
        parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
        parser.add_argument("--arms", nargs="+", choices=list(self.arms), default=list(self.arms))
        options = parser.parse_args()
        command = " ".join([f"python benchmarks/{self.name}.py", *options.overrides])
        options.results.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            for arm in options.arms:
                self.run(arm, seed, options.runs / f"{arm}-{seed}", options.overrides)
                rows = [json.loads(path.read_text()) for path in sorted(options.runs.glob("*/result.json"))]
                page = f"# {self.title}\n\n`{command}`\n\n{self.table(rows)}"
                write_text(options.results / f"{self.name}.md", page)
                write_text(options.results / f"{self.name}.json", json.dumps(rows, indent=1) + "\n")


def name_of(sizes: MoAConfig, dense: str) -> str:
    """The kind of attention and its heads."""
    if sizes.routes:
        kv_heads = sizes.num_key_value_heads
        width = f"{kv_heads} x {sizes.head_dim}" if kv_heads > 1 else str(sizes.head_dim)
        return f"MoA, {sizes.active_heads} of {sizes.num_heads} experts of {width}"
    return f"{dense}, {sizes.num_heads} heads of {sizes.head_dim}"


def size_of(model: MoAPreTrainedModel, tokens: int, **inputs: Tensor) -> Row:
    """Parameters without and in the embeddings, and multiply-accumulates of a forward pass for each of its tokens."""
    embeddings = model.get_input_embeddings().weight.numel()
    return {
        "parameters": model.num_parameters() - embeddings,
        "embeddings": embeddings,
        "macs": forward_macs(model, **inputs) / tokens,
    }


def size_cells(row: Row) -> list[str]:
    """`size_of` as two cells of the table."""
    return [f"{row['parameters']:,} (+ {row['embeddings']:,})", f"{row['macs']:,.0f}"]


def mean(values: Iterable[float]) -> str:
    """With the standard deviation, where there are several."""
    values = list(values)
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"
