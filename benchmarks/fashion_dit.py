"""Clothes of a small DiT in pixel space: dense, with 90% and with 75% of its heads; the same steps, several seeds.

    mixhead fetch fashion-mnist
    mixhead train fashion-mnist-features --run RUNS/features
    python benchmarks/fashion_dit.py --runs RUNS --seeds 0 1 2

Each arm is trained by the recipe fashion-mnist-moh-dit, then draws the same number of images of every class, without
guidance, as the published tables do. They are compared with the test images through the features of the small
classifier. The run can be stopped at any time: called again, it goes on where it was; called twice at once, the runs
are shared. The table and the grids are written anew from all runs that are complete.

glibc returns memory to the system after every step; to keep it saves a third of the time:
MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483648.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import functools
import json
import statistics as stats
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mixhead.data.labelled_images import open_images
from mixhead.data.noised_images import pixel_inputs
from mixhead.ops.crossover import cpu_model
from mixhead.tasks.image_generation.drawing import write_png
from mixhead.tasks.image_generation.features import ClassifierFeatures
from mixhead.tasks.image_generation.metrics import ImageStatistics, compare, statistics
from mixhead.tasks.image_generation.sampling import class_names, grid, load_pipeline, sample_images
from mixhead.tasks.image_generation.sampling_config import SamplingConfig
from mixhead.tasks.registry import train_recipe
from mixhead.training.recipes import read_recipe

RECIPE = "fashion-mnist-moh-dit"
ARMS = {
    "dense": ("model.shared_heads=null", "model.top_k=null"),
    "90%": (),
    "75%": ("model.shared_heads=[2,2,2,5]", "model.top_k=[1,1,2,0]"),
}
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
SAMPLING = SamplingConfig(steps=20, sampler="dpm", group=50, batch_size=50)
GRID = SamplingConfig(steps=30, sampler="dpm", guidance=2.0, group=10, batch_size=10)


def main() -> None:
    arguments = parse_arguments()
    extractor = ClassifierFeatures(arguments.runs / "features" / "model")
    real = functools.cache(lambda: statistics(extractor, real_images()))
    for seed in arguments.seeds:
        for arm in ARMS:
            folder = arguments.runs / f"{arm.rstrip('%')}-{seed}"
            with taken(folder) as mine:
                if mine and not (folder / "result.json").is_file():
                    measure(arm, seed, folder, extractor, real, arguments)
    write_results(arguments)


@contextlib.contextmanager
def taken(folder: Path) -> Iterator[bool]:
    """Whether nobody else works in the folder; until the end of the block, nobody will."""
    with folder.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=1000, help="drawn per run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="values of the recipe to replace, as for mixhead train")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def real_images() -> Iterator[Tensor]:
    kept = pixel_inputs(open_images("fashion-mnist", "test"), size=28, channels=1).kept_MCYX
    assert kept is not None
    yield from kept.split(500)


def measure(
    arm: str,
    seed: int,
    folder: Path,
    extractor: ClassifierFeatures,
    real: Callable[[], ImageStatistics],
    arguments: argparse.Namespace,
) -> None:
    """Trains one arm, draws its images, compares them, writes result.json and grid.png."""
    began, resumed = time.process_time(), folder.exists()
    recipe = read_recipe(RECIPE, [*ARMS[arm], f"seed={seed}", *arguments.overrides])
    trained = train_recipe(recipe, folder, resume=True)
    minutes = None if resumed else (time.process_time() - began) / 60
    pipeline = load_pipeline(trained.folder)
    classes = len(class_names(pipeline))
    asked = [number % classes for number in range(arguments.images)]
    quality = compare(extractor.name, statistics(extractor, sample_images(pipeline, asked, SAMPLING)), real())
    columns = [number % classes for number in range(6 * classes)]
    write_png(grid(torch.cat(list(sample_images(pipeline, columns, GRID))), classes), folder / "grid.png")
    result = {
        "arm": arm,
        "seed": seed,
        "quality": quality,
        "losses": dict(trained.metrics),
        "minutes": minutes,
        "recipe": recipe.values,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(arm, seed, f"FID {quality['fid']:.3f}", flush=True)


def write_results(arguments: argparse.Namespace) -> None:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(arguments.runs.glob("*/result.json"))]
    if not found:
        return
    (RESULTS / "fashion_dit.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "fashion_dit.md").write_text(report(found, arguments), encoding="utf-8")
    for arm in ARMS:
        pictures = sorted(arguments.runs.glob(f"{arm.rstrip('%')}-*/grid.png"))
        if pictures:
            with Image.open(pictures[0]) as small:
                twice = small.resize((2 * small.width, 2 * small.height), Image.Resampling.NEAREST)
            twice.save(IMAGES / f"fashion-dit-{arm.rstrip('%')}.png", optimize=True)


def report(found: list[dict], arguments: argparse.Namespace) -> str:
    quality, recipe = found[0]["quality"], found[0]["recipe"]
    lines = [
        "# A small DiT on Fashion-MNIST, in pixel space",
        "",
        f"`python benchmarks/fashion_dit.py --runs RUNS --seeds {' '.join(map(str, arguments.seeds))}`, "
        f"{datetime.date.today()}, torch {torch.__version__}, {cpu_model()}, {arguments.threads} thread(s).",
        "",
        f"Every run: {recipe['training']['steps']} steps of {recipe['training']['batch_size']} images; "
        f"{quality['generated']:,} images drawn with {SAMPLING.steps} steps of DPM-Solver++ without guidance, compared "
        f"with the {quality['real']:,} test images. Features and classes: {quality['extractor']}. **These are not "
        "Inception features**: the figures compare the rows with each other, and with nothing else. The recipe was "
        "changed once, after a first dense run of 3,000 steps on mirrored images (FID 8.3); nothing was chosen between "
        "the arms.",
        "",
        "| heads | seed | FID | sFID | classifier score | precision | recall | noise error | CPU minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        rows = [row for row in found if row["arm"] == arm]
        for row in rows:
            q = row["quality"]
            minutes = "-" if row["minutes"] is None else f"{row['minutes']:.1f}"
            lines.append(
                f"| {arm} | {row['seed']} | {q['fid']:.3f} | {q['sfid']:.3f} | {q['inception_score']:.3f} | "
                f"{q['precision']:.3f} | {q['recall']:.3f} | {row['losses']['noise']:.4f} | {minutes} |"
            )
    lines += ["", "| heads | seeds | FID, mean | standard deviation |", "|---|---|---|---|"]
    for arm in ARMS:
        fids = [row["quality"]["fid"] for row in found if row["arm"] == arm]
        if fids:
            deviation = f"{stats.stdev(fids):.3f}" if len(fids) > 1 else "-"
            lines.append(f"| {arm} | {len(fids)} | {stats.mean(fids):.3f} | {deviation} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
