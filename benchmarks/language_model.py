"""What conversion costs SmolLM2-135M, before and after tuning: every arm reads the same tokens.

    python benchmarks/language_model.py --run RUNS --tokens 163840

Arms: the original; the published recipe (first heads shared, query norm) at 7 of 9 heads; ours at 7 and at 6 of 9. Each
is evaluated before and after tuning on the test part of the addresses, and before tuning on a text of another kind if
`--other` names one. The run can be stopped at any time: called again, it goes on where it was. `--only` runs single
arms; the table is written from all that are complete.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixhead
from mixhead.data.text import text_source
from mixhead.data.windows import token_windows
from mixhead.interop.smollm2 import smollm2_folder
from mixhead.ops.crossover import cpu_model
from mixhead.tasks.language_modelling.comparison_table import Comparison, Row
from mixhead.tasks.language_modelling.evaluate import Accuracy, Perplexity, heads_of, perplexity
from mixhead.tasks.language_modelling.lm_eval_tasks import evaluate_tasks, write_tasks
from mixhead.tasks.language_modelling.train import TuneConfig, tune

WINDOW = 512
TEST_WINDOWS = 48
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Arm:
    """One model of the comparison, and how it is made from the original."""

    title: str
    config: mixhead.MoHConfig | None
    budget: str = "sensitivity"
    refit_output: bool = True
    tuned: bool = True


def published(active_heads: int) -> mixhead.MoHConfig:
    """The published recipe for LLaMA3 at 9 heads: the first half (4) shared, the rest by query norm."""
    return mixhead.MoHConfig(active_heads=active_heads, shared_heads=4, router="query_norm")


def ours(active_heads: int, shared_heads: int, group_balanced: bool = False) -> mixhead.MoHConfig:
    """A linear router, to be calibrated."""
    return mixhead.MoHConfig(active_heads=active_heads, shared_heads=shared_heads, group_balanced=group_balanced)


ARMS = {
    "original": Arm("original", None),
    "published-7": Arm("published recipe (first 4 shared, query norm)", published(7)),
    "mixhead-7": Arm("mixhead, calibrated", ours(7, 0)),
    "mixhead-6": Arm("mixhead, calibrated", ours(6, 0)),
    # What the parts of calibration are worth; these are not tuned.
    "uniform-7": Arm("as many heads in every layer", ours(7, 0), budget="uniform", tuned=False),
    "shared-2-7": Arm("2 of 7 heads shared", ours(7, 2), tuned=False),
    "shared-4-7": Arm("4 of 7 heads shared", ours(7, 4), tuned=False),
    "balanced-6": Arm("2 of 3 heads in every group", ours(6, 0, group_balanced=True), tuned=False),
    "original-output-7": Arm("output projections kept", ours(7, 0), refit_output=False, tuned=False),
    "original-output-6": Arm("output projections kept", ours(6, 0), refit_output=False, tuned=False),
    "mixhead-5": Arm("mixhead, calibrated", ours(5, 0), tuned=False),
}


def main() -> None:
    """Runs the arms that are not complete and writes the table."""
    arguments = parse_arguments()
    folder = smollm2_folder(arguments.run, say=print)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in arguments.only or ARMS:
        run_arm(name, ARMS[name], folder, tokenizer, arguments)
    table = make_table(arguments)
    print(table.to_markdown())
    if arguments.out is not None:
        arguments.out.with_suffix(".md").write_text(table.to_markdown(), encoding="utf-8")
        arguments.out.with_suffix(".json").write_text(table.to_json(), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder for models, checkpoints and logs (3 GB an arm)")
    parser.add_argument("--tokens", type=int, default=163_840, help="tokens to tune every arm on")
    parser.add_argument(
        "--tasks", type=int, default=0, help="questions of each lm-eval task, for tuned models; 0 leaves them out"
    )
    parser.add_argument("--other", type=Path, help="a text of another kind, for perplexity before tuning")
    parser.add_argument("--only", nargs="*", choices=list(ARMS), help="run only these arms")
    parser.add_argument("--out", type=Path, help="write the table to OUT.md and OUT.json")
    return parser.parse_args()


def run_arm(name: str, arm: Arm, dense: Path, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """Converts, evaluates, tunes and evaluates again; every result is kept in a file and not made twice."""
    place = arguments.run / name
    place.mkdir(parents=True, exist_ok=True)
    start = place / "start"
    results = place / "results.json"
    done: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    if not start.exists():
        model, seconds = convert(AutoModelForCausalLM.from_pretrained(dense), arm, tokenizer)
        mixhead.save(model, tokenizer, start)
        done["conversion_seconds"] = seconds
        keep(results, done)
    evaluations = {"before": start}
    if arguments.tokens and arm.tuned:
        evaluations[f"after-{arguments.tokens}"] = tuned(name, start, place, tokenizer, arguments.tokens, done)
        keep(results, done)
    for when, source in evaluations.items():
        evaluate(
            AutoModelForCausalLM.from_pretrained(source), tokenizer, when, done, arguments, lambda: keep(results, done)
        )


def convert(model: Any, arm: Arm, tokenizer: Any) -> tuple[Any, float]:
    """The arm's model, and the seconds that its conversion took."""
    begin = time.perf_counter()
    if arm.config is not None:
        mixhead.convert(model, arm.config)
        if arm.config.router == "linear":
            windows_WT = token_windows(tokenizer, text_source("addresses", "calibration"), WINDOW, 32)
            config = mixhead.CalibrationConfig(autocast=BF16, budget=arm.budget, refit_output=arm.refit_output)
            report = mixhead.calibrate(model, windows_WT.split(4), config)
            print([layer.active_heads for layer in report.layers])
    return model, time.perf_counter() - begin


def tuned(name: str, start: Path, place: Path, tokenizer: Any, tokens: int, done: dict[str, Any]) -> Path:
    """The folder of the tuned model; an interrupted run goes on."""
    run = place / f"tuned-{tokens}"
    if f"tuned-{tokens}" not in done:
        windows_WT = token_windows(tokenizer, text_source("addresses", "train"), WINDOW)
        config = TuneConfig(tokens=tokens, save_every=20, keep_checkpoints=1)
        model = AutoModelForCausalLM.from_pretrained(start)
        print(f"Tuning {name} on {tokens:,} tokens.", flush=True)
        result = tune(model, windows_WT, config, run, resume=run.exists(), tokenizer=tokenizer)
        done[f"tuned-{tokens}"] = {"folder": str(result.folder), "seconds": result.seconds, "tokens": result.tokens}
    return Path(done[f"tuned-{tokens}"]["folder"])


def evaluate(
    model: Any, tokenizer: Any, when: str, done: dict[str, Any], arguments: argparse.Namespace, save: Callable[[], None]
) -> None:
    """Perplexities, and the tasks if they are wanted."""
    active, heads = heads_of(model)
    done.setdefault(when, {"active": active, "heads": heads})
    texts: dict[str, Callable[[], Tensor]] = {
        "test": lambda: token_windows(tokenizer, text_source("addresses", "test"), WINDOW, TEST_WINDOWS)
    }
    if arguments.other is not None and when == "before":
        texts["other"] = lambda: token_windows(tokenizer, text_source(arguments.other), WINDOW, TEST_WINDOWS)
    for text, windows in texts.items():
        if text not in done[when]:
            done[when][text] = vars(perplexity(model, windows(), autocast=BF16))
            save()
    if arguments.tasks and when != "before" and "cloze" not in done[when]:
        write_tasks(arguments.run / "tasks", items=arguments.tasks)
        scores = evaluate_tasks(model, tokenizer, arguments.run / "tasks", autocast=BF16)
        done[when] |= {"cloze": vars(scores.cloze), "choice": vars(scores.choice), "task_seconds": scores.seconds}
        save()


def keep(path: Path, value: dict[str, Any]) -> None:
    """Writes JSON under a temporary name and renames it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)


def make_table(arguments: argparse.Namespace) -> Comparison:
    """All arms that have results, untuned ones first."""
    rows = []
    for when in ("before", f"after-{arguments.tokens}"):
        for name, arm in ARMS.items():
            done = results_of(name, arguments)
            if "test" in done.get(when, {}):
                rows.append(make_row(arm, name, done, when, arguments.tokens if when != "before" else 0))
    other = [
        f"On another text before tuning: {name} {Perplexity(**before['other']).perplexity:.2f}."
        for name in ARMS
        if "other" in (before := results_of(name, arguments).get("before", {}))
    ]
    notes = (
        f"SmolLM2-135M-Instruct; {TEST_WINDOWS} windows of {WINDOW} tokens of held-out addresses; tuning: batch 4 x "
        f"{WINDOW}, AdamW 5e-5 falling to 5e-6, bfloat16 autocast, seed 0; one seed.",
        *other,
        f"python benchmarks/language_model.py --run RUNS --tokens {arguments.tokens} --tasks {arguments.tasks}",
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads, {cpu_model()}.",
    )
    return Comparison("SmolLM2-135M as mixture-of-head", tuple(rows), notes)


def results_of(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What has been measured of an arm."""
    file = arguments.run / name / "results.json"
    return json.loads(file.read_text()) if file.exists() else {}


def make_row(arm: Arm, name: str, done: dict[str, Any], when: str, tokens: int) -> Row:
    """One line of the table."""
    measured = done[when]
    seconds = done.get("conversion_seconds", 0.0) + measured["test"]["seconds"] + measured.get("task_seconds", 0.0)
    if tokens:
        seconds += done[f"tuned-{tokens}"]["seconds"]
    return Row(
        name=arm.title + (", tuned" if tokens else ""),
        active_heads=measured["active"],
        heads=measured["heads"],
        tuning_tokens=tokens,
        perplexity=Perplexity(**{**measured["test"], "window_nll": tuple(measured["test"]["window_nll"])}),
        cloze=Accuracy(**measured["cloze"]) if "cloze" in measured else None,
        choice=Accuracy(**measured["choice"]) if "choice" in measured else None,
        seconds=seconds,
        original=name == "original",
    )


if __name__ == "__main__":
    main()
