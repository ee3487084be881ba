"""English-German with MoA, a Transformer of the same parameters, and one of the same multiply-accumulates.

    python benchmarks/translation.py [--runs runs/translation] [--seeds 0 1 2] [--arms moa same-compute same-parameters]
                                     [key=value ...]

Every arm is the recipe `moa-en-de` with another attention; data, vocabulary, steps and learning rate are the same. Runs
that are complete are not made again, those that were stopped go on. After each run the table of all that are complete
is written to benchmarks/results/translation.md and translation.json.
"""

import argparse
import datetime
import json
import platform
import statistics
from importlib.metadata import version
from pathlib import Path

import torch

from mixhead.models.moa import MoATransformerConfig, MoATransformerForConditionalGeneration
from mixhead.tasks.compute import forward_macs
from mixhead.tasks.moa_training import model_config
from mixhead.tasks.recipes import Recipe, read_recipe
from mixhead.tasks.translation import train

RESULTS = Path(__file__).parent / "results"
DENSE = {"active_heads": None, "head_dim": 32, "noisy": False}
# The projections of 3 experts of 64 cost as much as those of 4 heads of 32; the scores of the experts and the router
# cost a little more, for which the feed-forward layers of the Transformer are wider than 512.
ARMS = {
    "moa": {},
    "same-compute": {**DENSE, "num_heads": 4, "intermediate_size": 536},
    "same-parameters": {**DENSE, "num_heads": 9},
}
NAMES = {
    "moa": "MoA, {active_heads} of {num_heads} experts of {head_dim}",
    "same-compute": "Transformer of the same compute, {num_heads} heads of {head_dim}",
    "same-parameters": "Transformer of the same parameters, {num_heads} heads of {head_dim}",
}
LENGTH = 20  # tokens of source and target in the count of multiply-accumulates


def recipe_of(arm: str, seed: int, overrides: list[str]) -> Recipe:
    recipe = read_recipe("moa-en-de", [*overrides, f"seed={seed}"])
    values = {**recipe.values, "model": {**recipe.values["model"], **ARMS[arm]}}
    return Recipe(recipe.name, recipe.task, values)


def compute_of(recipe: Recipe) -> dict:
    """What does not depend on the training."""
    torch.manual_seed(0)
    sizes = model_config(MoATransformerConfig, recipe.values["model"], recipe.values["vocabulary"])
    model = MoATransformerForConditionalGeneration(sizes)
    ids = torch.randint(4, sizes.vocab_size, (1, LENGTH))
    macs = forward_macs(model, input_ids=ids, decoder_input_ids=ids)
    embeddings = model.get_input_embeddings().weight.numel()
    return {
        "parameters": model.num_parameters() - embeddings,
        "embeddings": embeddings,
        "macs": macs / LENGTH,
        "sizes": {name: getattr(sizes, name) for name in ("num_heads", "active_heads", "head_dim")},
    }


def run(arm: str, seed: int, folder: Path, overrides: list[str]) -> dict:
    done = folder / "result.json"
    if done.is_file():
        return json.loads(done.read_text())
    recipe = recipe_of(arm, seed, overrides)
    result = train(recipe, folder, resume=(folder / "recipe.json").is_file())
    counted = compute_of(recipe)
    row = {
        "arm": arm,
        "seed": seed,
        "name": NAMES[arm].format(**counted["sizes"]),
        **{name: counted[name] for name in ("parameters", "embeddings", "macs")},
        "steps": recipe.values["steps"],
        "metrics": dict(result.metrics),
        "date": datetime.date.today().isoformat(),
    }
    done.write_text(json.dumps(row, indent=1) + "\n")
    return row


def finished(runs: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(runs.glob("*/result.json"))]


def mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(rows: list[dict], seeds: int) -> str:
    first = rows[0]["metrics"]
    tests = [name.partition(":")[0] for name in first if name.endswith(": sacreBLEU")]
    columns = ["model", "seeds", "parameters (and embeddings)", "MACs per target token"]
    for test in tests:
        columns += [f"{test}: sacreBLEU", "chrF", "compound-split BLEU", "sentences per CPU second"]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for arm in ARMS:
        of_arm = [row for row in rows if row["arm"] == arm]
        if not of_arm:
            continue
        metrics = [row["metrics"] for row in of_arm]
        cells = [
            of_arm[0]["name"],
            str(len(of_arm)),
            f"{of_arm[0]['parameters']:,} (+ {of_arm[0]['embeddings']:,})",
            f"{of_arm[0]['macs']:,.0f}",
        ]
        for test in tests:
            cells += [mean([m[f"{test}: {score}"] for m in metrics]) for score in ("sacreBLEU", "chrF")]
            cells.append(mean([m[f"{test}: compound-split BLEU"] for m in metrics]))
            cells.append(mean([m[f"{test}: sentences"] / m[f"{test}: CPU seconds"] for m in metrics]))
        lines.append(f"| {' | '.join(cells)} |")
    missing = seeds * len(ARMS) - len(rows)
    notes = [
        f"{len(rows)} runs of {rows[0]['steps']} steps, {', '.join(sorted({row['date'] for row in rows}))}; "
        f"{first['training pairs']:,} training pairs, {first['rounds']:.1f} rounds; training took "
        f"{mean([row['metrics']['training seconds'] / 60 for row in rows])} minutes a run beside other work.",
        f"torch {version('torch')}, transformers {version('transformers')}, sacrebleu {version('sacrebleu')}; {cpu()}, "
        "one thread.",
        f"MACs: of the matrix products of encoder, decoder and output layer, for {LENGTH} source and {LENGTH} target "
        "tokens, as executed.",
        f"sacreBLEU: `{first['sacreBLEU signature']}`; chrF: `{first['chrF signature']}`.",
        "± is the standard deviation over seeds.",
    ]
    if missing > 0:
        notes.insert(0, f"**Incomplete: {missing} of {seeds * len(ARMS)} runs are still to be made.**")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="values of the recipe, for a shorter trial")
    parser.add_argument("--runs", type=Path, default=Path("runs/translation"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    options = parser.parse_args()
    command = " ".join(["python benchmarks/translation.py", *options.overrides])
    for seed in options.seeds:
        for arm in options.arms:
            run(arm, seed, options.runs / f"{arm}-{seed}", options.overrides)
            rows = finished(options.runs)
            options.results.mkdir(parents=True, exist_ok=True)
            page = f"# English-German\n\n`{command}`\n\n{table(rows, seeds=3)}"
            (options.results / "translation.md").write_text(page)
            (options.results / "translation.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
