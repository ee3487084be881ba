"""The course of a run: its folder is opened or found again, the Trainer works, the log and the bar follow it."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging as hf_logging

from mixhead.errors import MixheadError
from mixhead.files import remove_partial, write_text
from mixhead.precision import takes_bfloat16
from mixhead.training.checkpoints import checkpoints, step_of
from mixhead.training.progress import ProgressBar, StepLog
from mixhead.training.trainer import RunMixin

logger = logging.getLogger(__name__)

LOG = "log.csv"
BF16 = "bf16"  # the key of a manifest that says what was settled; `settled_bf16` compares it
# Settings that a run may be continued with in spite of a difference.
HARMLESS = ("save_every", "keep_checkpoints", "dataloader_workers", BF16)


def log_columns(trainer: RunMixin) -> tuple[str, ...]:
    """The columns of `log.csv`: counts, what the trainer notes, and its pace (seconds since the start of the run)."""
    pace = ("gradient_norm", "learning_rate", f"{trainer.unit}_per_second", "seconds")
    return ("step", trainer.unit, *trainer.columns, *pace)


def open_run(trainer: RunMixin, manifest: str, passport: Mapping[str, Any], resume: bool) -> int:
    """Starts the folder of a run, or finds the steps that are done in it.

    Args:
        trainer: whose `run_folder` it is.
        manifest: name of the JSON file in it that says what was asked for.
        passport: what was asked for now; where the run exists, it must be the same.
        resume: whether a run that exists may be continued.

    Raises:
        MixheadError: where the folder holds a run that shall not or cannot be continued, or cannot be written to.
    """
    run, path = trainer.run_folder, trainer.run_folder / manifest
    begun = path.exists()
    if begun and not resume:
        raise MixheadError(
            f"{run} holds a run already: continue it with resume=True (--resume), or give another folder."
        )
    trainer.bf16_autocast = settled_bf16(trainer, path if begun else None)
    settled = {"processes": trainer.accelerator.num_processes, BF16: trainer.bf16_autocast}
    asked = {**json.loads(json.dumps(passport)), **settled}
    if begun:
        _check_same_run(path, asked)
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        try:
            run.mkdir(parents=True, exist_ok=True)
            remove_partial(run)
            write_text(path, json.dumps(asked, indent=2) + "\n")
        except OSError as error:
            raise MixheadError(f"The folder of the run, {run}, cannot be written to ({error}).") from error
    trainer.accelerator.wait_for_everyone()
    complete = checkpoints(run)
    return step_of(complete[-1]) if complete else 0


def settled_bf16(trainer: RunMixin, manifest: Path | None) -> bool:
    """Whether a run computes in bfloat16: as it began, and a new one as this machine is faster.

    Raises:
        MixheadError: where another precision was asked for than the run began with.
    """
    asked = trainer.bf16
    if manifest is None:
        # One process decides for all: their measurements may differ.
        [taken] = broadcast_object_list([takes_bfloat16(asked) if trainer.accelerator.is_main_process else None])
        return bool(taken)
    before = _bf16_of(_read(manifest), trainer.former_bf16)
    if asked not in ("auto", before):
        raise _other_settings(trainer.run_folder, f"{BF16} was {before} and is {asked}")
    return before


def _bf16_of(manifest: Mapping[str, Any], former: bool) -> bool:
    """What a manifest says, of whichever version: there, with the settings, or not at all."""
    for place in (manifest, manifest.get("config"), manifest.get("training")):
        if isinstance(place, Mapping) and isinstance(place.get(BF16), bool):
            return place[BF16]
    return former


def _read(manifest: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(manifest.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise MixheadError(f"{manifest} cannot be read ({error}): give another folder for a new run.") from error


def _other_settings(run: Path, differences: str) -> MixheadError:
    return MixheadError(
        f"The run in {run} cannot be continued with other settings ({differences}): "
        "give the ones that it began with, or another folder."
    )


def _check_same_run(manifest: Path, asked: Mapping[str, Any]) -> None:
    found = dict(_differences(_read(manifest), asked))
    if found:
        listed = "; ".join(f"{name} was {before!r} and is {now!r}" for name, (before, now) in found.items())
        raise _other_settings(manifest.parent, listed)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new)
        elif old != new and name not in HARMLESS:
            yield name, (old, new)


def run_training(trainer: RunMixin, done: int, title: str = "Training", progress: bool = True) -> float:
    """Trains to the end, from the newest checkpoint where `done` steps are done; returns the seconds of the whole run.

    Raises:
        MixheadError: where the loss becomes NaN or the disk is full. The checkpoints that were complete stay.
        KeyboardInterrupt: after Ctrl-C, when the running step has ended and a checkpoint is written.
    """
    run, main = trainer.run_folder, trainer.accelerator.is_main_process
    checkpoint = str(checkpoints(run)[-1]) if done else None
    steps = trainer.args.max_steps
    log = StepLog(run / LOG, log_columns(trainer), done) if main else None
    try:
        with (
            _no_bars_of_transformers(),
            ProgressBar(title, steps, done, trainer.unit, progress and main) as bar,
            _ctrl_c_asks(trainer),
        ):
            report = StepReport(trainer, log, bar)
            trainer.add_callback(report)
            trainer.train(resume_from_checkpoint=checkpoint)
    except OSError as error:
        raise MixheadError(f"The run cannot be written to ({error}). {trainer.where_to_resume()}") from error
    finally:
        if log is not None:
            log.close()
    if trainer.state.global_step < steps:
        sentence = f"{title} was stopped after step {trainer.state.global_step} of {steps}. {trainer.where_to_resume()}"
        logger.warning(sentence)
        raise KeyboardInterrupt(sentence)
    return report.seconds


class StepReport(TrainerCallback):
    """After every optimizer step: is all of it a number, a row in the log, the bar, a wish to stop."""

    def __init__(self, trainer: RunMixin, log: StepLog | None, bar: ProgressBar) -> None:
        self.trainer, self.log, self.bar = trainer, log, bar
        self.seconds = 0.0 if log is None else log.seconds  # of the whole run
        self.row: dict[str, float | int | None] = {}
        self._clock = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._clock = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the weights change, so that NaN never reaches them."""
        trainer = self.trainer
        row = trainer.step_row(trainer.finish_step())
        loss, norm = row["loss"], trainer.gradient_norm
        if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
            what = f"loss became {loss}" if not math.isfinite(loss) else f"norm of the gradients became {norm}"
            raise MixheadError(
                f"The {what} at step {state.global_step + 1}, so training stopped before it reached the weights. "
                f"{trainer.where_to_resume()} A lower learning rate or a lower router learning rate may help; so may "
                "looking for NaN in the model that you started from."
            )
        self.row = {**row, "gradient_norm": norm}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The row of the step that ended."""
        now = time.perf_counter()
        took, self._clock = now - self._clock, now
        self.seconds += took
        trainer = self.trainer
        if self.log is not None:
            self.row |= {
                "step": state.global_step,
                trainer.unit: state.global_step * trainer.units_per_step,
                f"{trainer.unit}_per_second": trainer.units_per_step / max(took, 1e-9),
                "seconds": self.seconds,
            }
            self.log.write(self.row)
            loss = self.row["loss"]
            assert loss is not None
            self.bar.update(state.global_step, loss, trainer.units_per_step)
        alone = trainer.accelerator.num_processes == 1
        if trainer.stopping or (alone and trainer.interrupted):
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writing a checkpoint is not time of the next step."""
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now


@contextmanager
def _no_bars_of_transformers() -> Iterator[None]:
    """Saving shows a bar for every checkpoint, right through ours."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


@contextmanager
def _ctrl_c_asks(trainer: RunMixin) -> Iterator[None]:
    """The first Ctrl-C ends the run after the step, with a checkpoint; the second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        del number, frame
        trainer.interrupted = True
        signal.signal(signal.SIGINT, before)
        logger.warning("Stopping after this step, with a checkpoint; press Ctrl-C again to stop at once.")

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
