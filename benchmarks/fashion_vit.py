"""A small TransNeXt on Fashion-MNIST: dense, with 75% and 50% of its heads, and two ablations; several seeds each.

    mixhead fetch fashion-mnist
    python benchmarks/fashion_vit.py [--arms moh-vit-fashion ...] [--seeds 0 1 2] [--runs runs/fashion-vit]

Every arm is a recipe of mixhead, with the same sizes, data, steps, learning rate and augmentation. Runs that are
complete are not made again, those that were stopped go on, and several of these scripts may work on the same folder at
once. The table is made from all runs of the folder that are complete.
"""

import argparse
import fcntl
import json
import platform
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from mixhead import __version__
from mixhead.ops.crossover import cpu_model
from mixhead.tasks.registry import train_recipe
from mixhead.training.recipes import read_recipe

ARMS = {
    "transnext-fashion": "dense",
    "moh-vit-fashion": "75% of the heads",
    "moh-vit-fashion-50": "50% of the heads",
    "moh-vit-fashion-no-shared": "75%, no shared heads",
    "moh-vit-fashion-one-stage": "75%, one-stage routing",
}
RESULTS = Path(__file__).parent / "results"


def run_arm(arm: str, seed: int, runs: Path) -> None:
    """One training, unless it is complete or another process is at it."""
    runs.mkdir(parents=True, exist_ok=True)
    result = runs / f"{arm}-{seed}.json"
    with (runs / f"{arm}-{seed}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if not result.is_file():
            recipe = read_recipe(arm, [f"seed={seed}"])
            done = train_recipe(recipe, runs / f"{arm}-{seed}", resume=True)
            log = (done.folder.parent / "log.csv").read_text().splitlines()
            last = dict(zip(log[0].split(","), log[-1].split(","), strict=True))
            health = {
                name: float(last[name]) for name in ("smallest_load", "largest_load", "load_entropy") if last[name]
            }
            result.write_text(json.dumps({"arm": arm, "seed": seed, **done.metrics, **health}) + "\n")
            print(result.read_text(), flush=True)


def table(results: list[dict]) -> str:
    """Mean and spread of each arm, and what the figures ask for."""
    by_arm = {arm: sorted((r for r in results if r["arm"] == arm), key=lambda r: r["seed"]) for arm in ARMS}
    lines = [
        "| model | top-1, mean ± s.d. (%) | of each seed | top-5 (%) | heads used | load, least to most | seeds |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for arm, found in by_arm.items():
        if not found:
            continue
        top1 = [r["top-1 (%)"] for r in found]
        spread = f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else "?"
        load = (
            ""
            if "smallest_load" not in found[0]
            else " to ".join(
                f"{statistics.fmean(r[name] for r in found):.0%}" for name in ("smallest_load", "largest_load")
            )
        )
        lines.append(
            f"| {ARMS[arm]} (`{arm}`) | {statistics.fmean(top1):.2f} ± {spread} | "
            f"{', '.join(f'{value:.2f}' for value in top1)} | {statistics.fmean(r['top-5 (%)'] for r in found):.2f} | "
            f"{statistics.fmean(r['heads used (%)'] for r in found):.0f}% | {load} | {len(found)} |"
        )
    return "\n".join(lines) + "\n" + verdicts(by_arm)


def verdicts(by_arm: dict[str, list[dict]]) -> str:
    """Whether the two figures are reached."""
    dense, most, half = ([r["top-1 (%)"] for r in by_arm[arm]] for arm in list(ARMS)[:3])
    lines = ""
    if min(len(dense), len(most)) > 1:
        loss, spread = statistics.fmean(dense) - statistics.fmean(most), statistics.stdev(dense)
        lines += (
            f"\n- 75% of the heads: {-loss:+.2f} points against dense; asked for: no worse than one standard deviation "
            f"of dense, {spread:.2f}: {'reached' if loss <= spread else 'missed'}.\n"
        )
    if dense and half:
        loss = statistics.fmean(dense) - statistics.fmean(half)
        lines += (
            f"- 50% of the heads: {-loss:+.2f} points; asked for: no worse than 0.5: "
            f"{'reached' if loss <= 0.5 else 'missed'}.\n"
        )
    return lines


def rounded(number: str) -> float:
    return round(float(number), 4)


def write_results(runs: Path) -> None:
    results = [json.loads(path.read_text(), parse_float=rounded) for path in sorted(runs.glob("*.json"))]
    if not results:
        return
    recipe = read_recipe("moh-vit-fashion").values
    head = (
        "# A small MoH-ViT on Fashion-MNIST\n\n"
        "`python benchmarks/fashion_vit.py`, "
        f"{datetime.now(UTC):%Y-%m-%d}; mixhead {__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}; {cpu_model()}, one thread for each training."
        "\n\n"
        f"All arms: {recipe['epochs']} epochs of 60,000 images, batches of {recipe['batch_size']}, learning rate "
        f"{recipe['learning_rate']}, the recipes of the same name; measured on the 10,000 test images after the last "
        "step. Load: share of the patches that use the least and the most used of the heads that compete, mean of the "
        "layers, in the last training step.\n\n"
    )
    (RESULTS / "fashion_vit.md").write_text(head + table(results), encoding="utf-8")
    (RESULTS / "fashion_vit.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion-vit"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for arm in options.arms:
            run_arm(arm, seed, options.runs)
    write_results(options.runs)


if __name__ == "__main__":
    sys.exit(main())
