"""The folder of a run: begun, or found again with what was asked for when it began.

`recipe.yaml` holds all settings, the defaults too, with absolute paths: `mixhead train RUN/recipe.yaml` makes the run
again. `fingerprint.json` holds what is no setting: the number of processes, what a task says of its data, versions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import yaml
from accelerate.utils import broadcast_object_list

from mixhead.errors import MixheadError
from mixhead.files import read_json, remove_partial, write_text
from mixhead.precision import takes_bfloat16
from mixhead.training.checkpoints import check, checkpoints, step_of
from mixhead.training.config import RunConfig
from mixhead.training.former import former_manifest, read_former
from mixhead.training.lock import only_run_in
from mixhead.training.recipes import parse_yaml, settings_from
from mixhead.training.trainer import RunTrainer

MANIFEST, FINGERPRINT = "recipe.yaml", "fingerprint.json"
# Settings that a run may be continued with in spite of a difference.
HARMLESS = ("save_every", "keep_checkpoints", "dataloader_workers", "versions")
HEADER = "# A run of mixhead with all its settings: `mixhead train THIS_FILE` makes it again.\n"


@contextmanager
def opened_run(trainer: RunTrainer[Any], task: str, resume: bool) -> Iterator[int]:
    """Begins the folder of a run, or finds the steps that are done in it; no other run may use it within the block.

    Decides in which precision the run computes.

    Args:
        trainer: whose `run_folder` it is.
        task: name of what is trained.
        resume: whether a run that exists may be continued; its settings must be the same.

    Raises:
        MixheadError: where the folder holds a run that shall not or cannot be continued, is in use by another one, or
            cannot be written to.
    """
    answer: list[Any] = [None]
    with ExitStack() as held:
        if trainer.accelerator.is_main_process:  # one process decides for all: what they measure may differ
            try:
                held.enter_context(only_run_in(trainer.run_folder))
                answer = [(_begin(trainer, task, resume), _steps_done(trainer.run_folder))]
            except (MixheadError, OSError) as error:
                answer = [str(error)]
        [decided] = broadcast_object_list(answer)
        if isinstance(decided, str):
            raise MixheadError(decided)
        trainer.bfloat16, done = decided
        yield done


def _steps_done(run: Path) -> int:
    """The steps before the newest checkpoint, whose files are compared with their check sums; 0 where there is none."""
    complete = checkpoints(run)
    if not complete:
        return 0
    check(complete[-1])
    return step_of(complete[-1])


def check_new_run(run: Path) -> None:
    """Raises where a folder holds a run, before models and data are read; of several processes the first one asks."""
    if os.environ.get("RANK", "0") == "0" and ((run / MANIFEST).is_file() or former_manifest(run) is not None):
        refuse_run(run)


def refuse_run(run: Path) -> NoReturn:
    """Raises: the run in a folder shall not be continued."""
    raise MixheadError(f"{run} holds a run already: continue it with resume=True (--resume), or give another folder.")


def _begin(trainer: RunTrainer[Any], task: str, resume: bool) -> bool:
    """Checks the folder and writes what is asked for into it; whether to compute in bfloat16."""
    run, config = trainer.run_folder, trainer.config
    before = _asked_before(run, task, type(config))
    if before and not resume:
        refuse_run(run)
    bfloat16 = config.precision == "bfloat16"
    if before and config.precision == "auto":
        bfloat16 = before["precision"] == "bfloat16"
    elif not before:
        bfloat16 = takes_bfloat16("auto" if config.precision == "auto" else bfloat16)
    settings = {**_plain(config), "precision": "bfloat16" if bfloat16 else "float32"}
    fingerprint = {"processes": trainer.accelerator.num_processes, **trainer.fingerprint()}
    if before:
        changed = dict(_differences(before, {name: {**settings, **fingerprint}.get(name) for name in before}))
        if changed:
            listed = "; ".join(f"{name} was {old!r} and is {new!r}" for name, (old, new) in changed.items())
            raise MixheadError(
                f"The run in {run} cannot be continued with other settings ({listed}): give the ones that it began "
                "with, or another folder."
            )
    versions = {name: version(name) for name in ("torch", "transformers")}
    try:
        remove_partial(run)
        recipe = yaml.safe_dump({"task": task, **settings}, sort_keys=False, allow_unicode=True)
        write_text(run / FINGERPRINT, json.dumps({**fingerprint, "versions": versions}, indent=2) + "\n")
        write_text(run / MANIFEST, HEADER + recipe)  # the last one: with it the run has begun
    except OSError as error:
        raise MixheadError(f"The folder of the run, {run}, cannot be written to ({error}).") from error
    return bfloat16


def _asked_before(run: Path, task: str, kind: type[RunConfig]) -> dict[str, Any]:
    """Settings and fingerprint of the run in a folder; empty where there is none."""
    path = run / MANIFEST
    former = None if path.is_file() else former_manifest(run)
    if former is None and not path.is_file():
        return {}
    try:
        if former is None:
            values = dict(parse_yaml(path.read_text(encoding="utf-8")))
            trained = values.pop("task")
            fingerprint = read_json(run / FINGERPRINT)
        else:
            trained, values, fingerprint = read_former(former, kind)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise MixheadError(f"{former or path} cannot be read ({error}): give another folder for a new run.") from error
    if trained != task:
        raise MixheadError(f"{run} holds a run of another task, {trained}: give another folder.")
    if former is not None and former.name == "tune.json":
        return {**values, **fingerprint}  # what is tuned was no setting then
    try:
        return {**_plain(settings_from(kind, values)), **fingerprint}
    except MixheadError as error:
        raise MixheadError(
            f"The run in {run} was begun with settings of an earlier version ({error}) and cannot be continued: finish "
            "it with that version, or give another folder."
        ) from error


def _plain(config: RunConfig) -> dict[str, Any]:
    """The settings as YAML can hold them."""
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))
    return values


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new)
        elif old != new and name not in HARMLESS:
            yield name, (old, new)
