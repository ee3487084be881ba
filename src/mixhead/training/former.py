"""What recipes and run folders of earlier versions said in other words: still understood."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixhead.errors import MixheadError
from mixhead.files import read_json

MANIFESTS = ("recipe.json", "run.json", "tune.json")
# What was computed in where `bf16` was not given.
PRECISION = {"class_conditional_generation": "float32", "small_classifier": "float32"}
NAMES = {"auto": "auto", True: "bfloat16", False: "float32"}  # of `bf16`


def todays_keys(task: str, values: Mapping[str, Any], defaults: Any) -> tuple[dict[str, Any], list[str]]:
    """The settings of a recipe under the keys of today, and what to write instead of each former key.

    Args:
        task: of the recipe.
        values: its settings.
        defaults: the dataclass of the task's settings, for the length of a run that the recipe leaves out.
    """
    values = dict(values)
    said: list[str] = []

    def replaced(former: str, key: str, value: Any) -> None:
        values[key] = value
        said.append(f"`{former}` is `{key}: {value}` now")

    if isinstance(values.get("training"), Mapping) and task == "class_conditional_generation":
        training = dict(values.pop("training"))
        said.append("the keys under `training` stand beside `data` and `model` now")
        steps = training.get("steps", values.get("steps", defaults.steps))
        for key in ("warmup", "cooldown"):
            if training.get(key):
                replaced(f"training.{key}: {training[key]}", key, share(training.pop(key), steps))
        values |= training
    if "bf16" in values:
        bf16 = values.pop("bf16")
        replaced(f"bf16: {bf16}", "precision", NAMES.get(bf16, bf16))
    for former, length in (("warmup_steps", "steps"), ("warmup_epochs", "epochs")):
        if former in values:
            count, whole = values.pop(former), values.get(length, getattr(defaults, length, None))
            replaced(f"{former}: {count}", "warmup", share(count, whole))
    return values, said


def share(count: Any, whole: Any) -> float:
    """A number of steps or epochs as a share of all.

    Raises:
        MixheadError: where these are no numbers.
    """
    try:
        return float(count) / float(whole)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise MixheadError(f"warmup is a share of the run, and {count!r} of {whole!r} is none.") from error


def former_manifest(run: Path) -> Path | None:
    """What says in a folder of an earlier version what was asked for; None where there is none."""
    found = [run / name for name in MANIFESTS if (run / name).is_file()]
    return found[0] if found else None


def read_former(manifest: Path, defaults: type) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Task of a run of an earlier version, its settings under the keys of today, the fingerprint of what it trained.

    Raises:
        MixheadError, TypeError, AttributeError: where the file cannot be read.
    """
    found = read_json(manifest)
    fingerprint = {"processes": found.pop("processes", 1)}
    decided = found.pop("bf16", None)
    if "config" in found:  # of `tune`: all settings, and what the model and the windows are
        settings = dict(found.pop("config"))
        fingerprint |= {"architecture": found.pop("model", None), **found}
    else:
        settings = {name: value for name, value in found.items() if name not in ("recipe", "task")}
    task = found.get("task", "language_modelling")
    nested = settings.get("training", settings)
    precision = nested.pop("bf16", None) if decided is None else decided
    nested.pop("bf16", None)
    values, _ = todays_keys(task, settings, defaults)
    values["precision"] = NAMES.get(precision, PRECISION.get(task, "bfloat16"))
    return task, values, fingerprint
