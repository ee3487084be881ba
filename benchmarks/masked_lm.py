"""Masked language modelling on the addresses: MoA, Transformers of the same parameters and compute, and more experts.

    python benchmarks/masked_lm.py [--runs runs/masked_lm] [--seeds 0 1 2] [--arms moa-8 ...] [key=value ...]

Every arm is the recipe `moa-mlm` with another attention; data, vocabulary, steps, masks and learning rate are the same.
The arms `moa-E` use 3 of E experts: what a token costs does not grow with E, but for the router. Runs that are complete
are not made again, those that were stopped go on. After each run the table of all that are complete is written to
benchmarks/results/masked_lm.md and masked_lm.json.
"""

import argparse
import datetime
import json
from importlib.metadata import version
from pathlib import Path

import torch
from translation import DENSE, RESULTS, cpu, finished, mean

from mixhead.models.moa import MoAEncoderConfig, MoAForMaskedLM
from mixhead.tasks.compute import forward_macs
from mixhead.tasks.masked_lm import train
from mixhead.tasks.moa_training import model_config
from mixhead.tasks.recipes import Recipe, read_recipe

# The feed-forward layers of the Transformer are wider than 512 to make up for the scores and routers of the experts.
ARMS = {
    "moa-8": {},
    "same-compute": {**DENSE, "num_heads": 4, "intermediate_size": 564},
    "same-parameters": {**DENSE, "num_heads": 9},
    "moa-3": {"num_heads": 3},
    "moa-16": {"num_heads": 16},
    "moa-32": {"num_heads": 32},
}


def recipe_of(arm: str, seed: int, overrides: list[str]) -> Recipe:
    recipe = read_recipe("moa-mlm", [*overrides, f"seed={seed}"])
    values = {**recipe.values, "model": {**recipe.values["model"], **ARMS[arm]}}
    return Recipe(recipe.name, recipe.task, values)


def compute_of(recipe: Recipe) -> dict:
    """What does not depend on the training."""
    torch.manual_seed(0)
    sizes = model_config(MoAEncoderConfig, recipe.values["model"], recipe.values["vocabulary"])
    model = MoAForMaskedLM(sizes)
    window = recipe.values["window"]
    macs = forward_macs(model, input_ids=torch.randint(4, sizes.vocab_size, (1, window)))
    embeddings = model.get_input_embeddings().weight.numel()
    kind = f"Transformer, {sizes.num_heads} heads of {sizes.head_dim}"
    if sizes.routes:
        kind = f"MoA, {sizes.active_heads} of {sizes.num_heads} experts of {sizes.head_dim}"
    return {
        "name": kind,
        "parameters": model.num_parameters() - embeddings,
        "embeddings": embeddings,
        "macs": macs / window,
    }


def run(arm: str, seed: int, folder: Path, overrides: list[str]) -> None:
    done = folder / "result.json"
    if done.is_file():
        return
    recipe = recipe_of(arm, seed, overrides)
    result = train(recipe, folder, resume=(folder / "recipe.json").is_file())
    row = {
        "arm": arm,
        "seed": seed,
        **compute_of(recipe),
        "steps": recipe.values["steps"],
        "metrics": dict(result.metrics),
        "date": datetime.date.today().isoformat(),
    }
    done.write_text(json.dumps(row, indent=1) + "\n")


def table(rows: list[dict], runs: int) -> str:
    columns = ["arm", "model", "seeds", "parameters (and embeddings)", "MACs per token", "masked perplexity"]
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for arm in ARMS:
        of_arm = [row for row in rows if row["arm"] == arm]
        if of_arm:
            first = of_arm[0]
            size = f"{first['parameters']:,} (+ {first['embeddings']:,})"
            perplexity = mean([row["metrics"]["masked perplexity"] for row in of_arm])
            lines.append(f"| {arm} | {first['name']} | {len(of_arm)} | {size} | {first['macs']:,.0f} | {perplexity} |")
    first = rows[0]["metrics"]
    notes = [
        f"{len(rows)} runs of {rows[0]['steps']} steps, {', '.join(sorted({row['date'] for row in rows}))}; "
        f"{first['training tokens']:,} training tokens, {first['rounds']:.1f} rounds, {first['test targets']:,} masked "
        f"tokens of test addresses; training took {mean([row['metrics']['training seconds'] / 60 for row in rows])} "
        "minutes a run beside other work.",
        f"torch {version('torch')}, transformers {version('transformers')}; {cpu()}, one thread.",
        "MACs: of all matrix products, the output layer at every token, as executed.",
        "± is the standard deviation over seeds.",
    ]
    if len(rows) < runs:
        notes.insert(0, f"**Incomplete: {runs - len(rows)} of {runs} runs are still to be made.**")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="values of the recipe, for a shorter trial")
    parser.add_argument("--runs", type=Path, default=Path("runs/masked_lm"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    options = parser.parse_args()
    command = " ".join(["python benchmarks/masked_lm.py", *options.overrides])
    for seed in options.seeds:
        for arm in options.arms:
            run(arm, seed, options.runs / f"{arm}-{seed}", options.overrides)
            rows = finished(options.runs)
            options.results.mkdir(parents=True, exist_ok=True)
            page = f"# Masked language modelling\n\n`{command}`\n\n{table(rows, 3 * len(ARMS))}"
            (options.results / "masked_lm.md").write_text(page)
            (options.results / "masked_lm.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
