"""What conversion costs DINOv2 ViT-S/14, before and after tuning, and what it gains at 518 px.

    python benchmarks/dinov2.py --data FOLDER --out benchmarks/results/dinov2
    python benchmarks/dinov2.py --only speed --out benchmarks/results/dinov2

Quality: a linear probe on Fashion-MNIST. The features are the class token and the mean of the patch tokens. `kept` is
the dense model's head on the converted model's features; `refitted` is a head fitted to them. Conversion and tuning see
no labels: routers are calibrated on training images, and tuning makes the final states those of the dense model.
Speed: one image of 518 px (1,369 patches and the class token) through the backbone, CPU time of one thread, dense and
converted in turn; before that the output is checked against the reference. FOLDER holds the four .gz files of
Fashion-MNIST; `--only` runs one of the two parts and keeps the other's results.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import mixhead
from mixhead.bench.results import describe_machine, write_whole
from mixhead.bench.timing import race, ratio, threads
from mixhead.tasks.dinov2 import IMAGE_MEAN, IMAGE_STD, dinov2_small
from mixhead.tasks.precision import autocast_dtype

HEADS = 6
CLASSES = 10
BATCH = 50
CALIBRATION_IMAGES = 500
LEARNING_RATE = 1e-4
PENALTY = 1e-3


@dataclass(frozen=True)
class Images:
    """Grey images [X, 28, 28], uint8, and their classes [X]."""

    grey: Tensor
    labels: Tensor

    def pixels(self, size: int, rows: slice | Tensor) -> Tensor:
        """Some of them as the model takes them: [B, 3, size, size], float32."""
        grey_B1YX = self.grey[rows, None].float() / 255
        large = F.interpolate(grey_B1YX, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
        mean, std = torch.tensor([IMAGE_MEAN, IMAGE_STD])[:, None, :, None, None]
        return (large.clamp(0, 1) - mean) / std


@dataclass(frozen=True)
class Head:
    """A linear classifier of features."""

    weight: Tensor
    bias: Tensor

    def right(self, features: Tensor, labels: Tensor) -> Tensor:
        """bool [X]: which images it gets right."""
        return (features.double() @ self.weight.T + self.bias).argmax(1) == labels


@dataclass(frozen=True)
class Score:
    """Accuracy in percent and what it lacks to the dense model's, in points, with standard errors over the images."""

    accuracy: float
    error: float
    difference: float
    difference_error: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the .gz files of Fashion-MNIST")
    parser.add_argument("--train", type=int, default=3000, help="training images, for the head and for tuning")
    parser.add_argument("--test", type=int, default=3000, help="test images")
    parser.add_argument("--size", type=int, default=98, help="pixels of an image's side for the probe")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training images in tuning")
    parser.add_argument("--heads", type=int, nargs="+", default=[4, 3], help="active heads of 6 to convert to")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of timing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("quality", "speed"))
    parser.add_argument("--out", type=Path, required=True, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    if options.only != "speed" and options.data is None:
        parser.error("--data is needed for the probe")
    torch.set_num_threads(1)
    if options.only != "speed":
        quality(options)
    if options.only != "quality":
        speed(options)


def keep(out: Path, part: str, rows: list[dict[str, Any]], **about: Any) -> None:
    """Writes rows beside what the files hold already; a row replaces that of the same heads."""
    file = out.with_suffix(".json")
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    former = results.get(part, {}).get("rows", [])
    merged = {identity(row): row for row in [*former, *rows]}
    about |= {"machine": describe_machine()}
    results[part] = {"rows": [merged[key] for key in sorted(merged, reverse=True)], **about}
    write_whole(file, json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(page(results))


def identity(row: dict[str, Any]) -> tuple[int, bool]:
    """What a row is about; larger ones come first in a table."""
    return row["active_heads"], not row.get("tuned", False)


def fashion(folder: Path, part: str, count: int) -> Images:
    """The first images of "train" or "t10k"; they are in random order."""
    pixels, labels = (
        gzip.decompress((folder / f"{part}-{kind}-ubyte.gz").read_bytes()) for kind in ("images-idx3", "labels-idx1")
    )
    grey = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)[:count].copy()
    return Images(
        torch.from_numpy(grey), torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8)[:count].astype(np.int64))
    )


def quality(options: argparse.Namespace) -> None:
    """The probe of the dense and of all converted models, before and after tuning."""
    begin = time.process_time()
    train, test = fashion(options.data, "train", options.train), fashion(options.data, "t10k", options.test)
    dense = dinov2_small()
    states = run(dense, train, options.size)
    train_features, test_features = pooled(states), pooled(run(dense, test, options.size))
    head = fit_head(train_features, train.labels)
    right = head.right(test_features, test.labels)
    arms = [
        {
            "active_heads": HEADS,
            "tuned": False,
            "kept": asdict(score(right, right)),
            "refitted": asdict(score(right, right)),
        }
    ]
    about = {"train": options.train, "test": options.test, "size": options.size}
    about |= {"epochs": options.epochs, "seed": options.seed}
    keep(options.out, "quality", arms, **about)
    for active_heads in options.heads:
        model = convert(dense, active_heads, train, options.size)
        layers = [layer["active_heads"] for layer in model.config.moh["layers"]]
        for tuned in (False, True):
            if tuned:
                tune(model, train, states, options)
            features = pooled(run(model, test, options.size))
            refitted = fit_head(pooled(run(model, train, options.size)), train.labels)
            arms.append(
                {
                    "active_heads": active_heads,
                    "tuned": tuned,
                    "layers": layers,
                    "kept": asdict(score(head.right(features, test.labels), right)),
                    "refitted": asdict(score(refitted.right(features, test.labels), right)),
                }
            )
            keep(options.out, "quality", arms[-1:], **about)
            print(f"{time.process_time() - begin:.0f} s of CPU time: {arms[-1]}", flush=True)


def run(model: Any, images: Images, size: int) -> Tensor:
    """Final states of all images: [X, N, C], bfloat16."""
    dtype = autocast_dtype()
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        parts = [
            model(pixel_values=images.pixels(size, slice(i, i + BATCH))).last_hidden_state.bfloat16()
            for i in range(0, len(images.labels), BATCH)
        ]
    return torch.cat(parts)


def pooled(states_XNC: Tensor) -> Tensor:
    """Features of the probe: the class token and the mean of the patch tokens, [X, 2 C]."""
    states_XNC = states_XNC.float()
    return torch.cat([states_XNC[:, 0], states_XNC[:, 1:].mean(1)], 1)


def fit_head(features: Tensor, labels: Tensor) -> Head:
    """Logistic regression on standardised features with a quadratic penalty, in float64."""
    features = features.double()
    mean, std = features.mean(0), features.std(0)
    inputs = (features - mean) / std
    weight = torch.zeros(CLASSES, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight.T + bias, labels) + PENALTY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    scaled = (weight / std).detach()
    return Head(scaled, (bias - scaled @ mean).detach())


def score(right: Tensor, dense: Tensor) -> Score:
    """Percent and points; the error of the difference is that of the images' own differences."""
    right, difference = right.double() * 100, (right.double() - dense.double()) * 100
    root = math.sqrt(len(right))
    return Score(
        float(right.mean()), float(right.std() / root), float(difference.mean()), float(difference.std() / root)
    )


def convert(dense: Any, active_heads: int, images: Images, size: int) -> Any:
    """A converted and calibrated copy. No labels, no gradients."""
    model = mixhead.convert(copy.deepcopy(dense), mixhead.MoHConfig(active_heads=active_heads))
    batches = [{"pixel_values": images.pixels(size, slice(i, i + BATCH))} for i in range(0, CALIBRATION_IMAGES, BATCH)]
    config = mixhead.CalibrationConfig(probe_sequences=BATCH, autocast=autocast_dtype())
    mixhead.calibrate(model, batches, config)
    return model


def tune(model: Any, images: Images, states_XNC: Tensor, options: argparse.Namespace) -> None:
    """Makes the final states, and what the probe reads of them, those of the dense model."""
    generator = torch.Generator().manual_seed(options.seed)
    dtype = autocast_dtype()
    order = torch.cat([torch.randperm(len(images.labels), generator=generator) for _ in range(options.epochs)])
    steps = order.split(BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=len(steps), pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for rows in steps:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            student_BNC = model(pixel_values=images.pixels(options.size, rows)).last_hidden_state.float()
        teacher_BNC = states_XNC[rows].float()
        loss = relative_error(student_BNC, teacher_BNC) + relative_error(pooled(student_BNC), pooled(teacher_BNC))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def relative_error(ours: Tensor, target: Tensor) -> Tensor:
    """Squared error over the square of the target."""
    return (ours - target).square().sum() / target.square().sum()


def speed(options: argparse.Namespace) -> None:
    """Forward passes at 518 px. Routers are calibrated on the only image at hand, noise with large structures."""
    generator = torch.Generator().manual_seed(options.seed)
    coarse = torch.rand(5, 3, 16, 16, generator=generator)
    mean, std = torch.tensor([IMAGE_MEAN, IMAGE_STD])[:, None, :, None, None]
    pixels = (F.interpolate(coarse, size=(518, 518), mode="bicubic").clamp(0, 1) - mean) / std
    dense = dinov2_small()
    image, rows = pixels[:1], []
    with torch.inference_mode(), threads(1):
        for active_heads in options.heads:
            model = mixhead.convert(copy.deepcopy(dense), mixhead.MoHConfig(active_heads=active_heads))
            mixhead.calibrate(
                model, [{"pixel_values": p[None]} for p in pixels[1:]], mixhead.CalibrationConfig(budget="uniform")
            )
            expected = model(pixel_values=image, head_attention_impl="reference").last_hidden_state
            actual = model(pixel_values=image).last_hidden_state
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            times = race(
                [lambda: dense(pixel_values=image), lambda: model(pixel_values=image)],  # noqa: B023
                options.rounds,
                0.0,
            )
            rows.append(
                {
                    "active_heads": active_heads,
                    "dense_ms": times[0].cpu_ms,
                    "ours_ms": times[1].cpu_ms,
                    "ratio": ratio(*times).cpu,
                }
            )
    keep(options.out, "speed", rows, rounds=options.rounds)
    print(rows)


def page(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = ["# DINOv2 ViT-S/14, converted", ""]
    if "quality" in results:
        lines += quality_lines(results["quality"])
    if "speed" in results:
        lines += speed_lines(results["speed"])
    return "\n".join(lines) + "\n"


def quality_lines(quality: dict[str, Any]) -> list[str]:
    """The table of the probe."""
    lines = [
        f"Linear probe on Fashion-MNIST at {quality['size']} px: {quality['train']:,} training and {quality['test']:,} "
        "test images. Accuracy in percent; differences from dense in points, with paired standard errors.",
        "",
        "| heads | | dense model's head | difference | head refitted | difference |",
        "|---|---|---|---|---|---|",
    ]
    for arm in quality["rows"]:
        dense = arm["active_heads"] == HEADS
        what = "dense" if dense else "tuned" if arm["tuned"] else "without training"
        cells = [f"{arm['active_heads']} of {HEADS}", what]
        for kind in ("kept", "refitted"):
            one = Score(**arm[kind])
            cells.append(f"{one.accuracy:.2f} ± {one.error:.2f}")
            cells.append("—" if dense else f"{one.difference:+.2f} ± {one.difference_error:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    tuned = [arm for arm in quality["rows"] if arm["tuned"]]
    layers = "; ".join(f"{arm['active_heads']} of {HEADS}: {arm['layers']}" for arm in tuned)
    lines += [
        "",
        f"Calibrated on {CALIBRATION_IMAGES} of the training images, without labels. Tuned: the final states are drawn",
        f"to those of the dense model, passes over the training images without labels: {quality['epochs']}, AdamW",
        f"{LEARNING_RATE:g}, batch {BATCH}, seed {quality['seed']}; the dense model has nothing to gain from that.",
        f"Heads by layer: {layers}.",
        "",
        machine_line(quality["machine"]),
        "",
        f"    python benchmarks/dinov2.py --data FOLDER --train {quality['train']} --test {quality['test']} "
        "--out benchmarks/results/dinov2",
        "",
    ]
    return lines


def speed_lines(speed: dict[str, Any]) -> list[str]:
    """The table of the times."""
    lines = [
        "## Speed at 518 px",
        "",
        "Backbone, one image (1,370 tokens), float32, one thread, CPU time, as many heads in every layer; medians of "
        f"{speed['rounds']} rounds in turn.",
        "",
        "| heads | dense | converted | dense / converted |",
        "|---|---|---|---|",
    ]
    for row in speed["rows"]:
        times = f"{row['dense_ms']:.0f} ms | {row['ours_ms']:.0f} ms | {row['ratio']:.2f}"
        lines.append(f"| {row['active_heads']} of {HEADS} | {times} |")
    return [*lines, "", machine_line(speed["machine"]), ""]


def machine_line(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"{machine['date'][:10]}, {machine['cpu']} ({machine['instruction_set']}), {versions}."


if __name__ == "__main__":
    main()
