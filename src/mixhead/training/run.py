"""The course of a run: its folder is opened or found again, the Trainer works, the log and the bar follow it."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging as hf_logging

from mixhead.errors import MixheadError
from mixhead.files import WRITE_ERRORS, write_folder
from mixhead.training.checkpoints import checkpoints
from mixhead.training.folder import MANIFEST, opened_run
from mixhead.training.progress import ProgressBar, StepLog
from mixhead.training.signals import signals_ask
from mixhead.training.trainer import Config, RunTrainer

logger = logging.getLogger(__name__)

LOG = "log.csv"
Metrics = Mapping[str, float | int | str]


def run_folder(recipe: str, resume: bool) -> Path:
    """The folder of a run where none was given: that of its own `recipe.yaml` to go on with it, else runs/RECIPE."""
    path = Path(recipe)
    return path.parent if resume and path.name == MANIFEST else Path("runs") / path.stem


def log_columns(trainer: RunTrainer[Any]) -> tuple[str, ...]:
    """The columns of `log.csv`: counts, what the trainer notes, and its pace (seconds since the start of the run)."""
    pace = ("gradient_norm", "learning_rate", f"{trainer.unit}_per_second", "seconds")
    return ("step", trainer.unit, *trainer.columns, *pace)


@dataclass(frozen=True)
class TrainingResult:
    """What a training did.

    Attributes:
        folder: the trained model, for `from_pretrained`.
        metrics: what was measured at the end, in the order in which it is shown; in the first of several processes.
        seconds: wall time of the whole run, without the time in which it was not running.
        resumed_from: the step after which this call took up the run; 0 for a fresh start.
    """

    folder: Path
    metrics: Metrics = field(default_factory=dict)
    seconds: float = 0.0
    resumed_from: int = 0


@dataclass(frozen=True)
class Task(Generic[Config]):
    """A kind of training.

    Attributes:
        config: its settings, a dataclass.
        build: from the settings and the folder of the run to a trainer: model, data and all that can be refused before
            the first step.
        measure: of a trainer that has ended, given the folder of its model.
    """

    config: type[Config]
    build: Callable[[Config, Path], RunTrainer[Config]]
    measure: Callable[[Any, Path], Metrics]


def train(
    trainer: RunTrainer[Any],
    task: str,
    resume: bool = False,
    *,
    measure: Callable[[Any, Path], Metrics] | None = None,
    title: str = "Training",
    progress: bool = True,
) -> TrainingResult:
    """A run from the first step, or the newest checkpoint, to the saved model and its measurement.

    Args:
        trainer: what is trained, and how.
        task: its name.
        resume: continues the run in the trainer's folder.
        measure: of the `Task`.
        title: of the progress bar.
        progress: shows a bar on standard error (without a terminal: a log line a minute).

    Raises:
        MixheadError: where the folder cannot be used, the loss becomes NaN, or the disk is full. The checkpoints that
            were complete stay.
        KeyboardInterrupt: after Ctrl-C, when the running step has ended and a checkpoint is written.
        SystemExit: with code 143, after SIGTERM, likewise.
    """
    with opened_run(trainer, task, resume) as done:
        seconds = run_training(trainer, done, title, progress)
        folder = save_model(trainer)
        metrics: dict[str, float | int | str] = {}
        if measure is not None and trainer.accelerator.is_main_process:
            metrics = {"training seconds": round(seconds, 1), **measure(trainer, folder)}
        trainer.accelerator.wait_for_everyone()
    return TrainingResult(folder, metrics, seconds, done)


def save_model(trainer: RunTrainer[Any]) -> Path:
    """Writes the trained model, whole or not at all."""
    folder = trainer.run_folder / "model"
    trainer.gather_weights()
    if trainer.accelerator.is_main_process:
        try:
            write_folder(folder, trainer.write_model)
        except WRITE_ERRORS as error:
            raise MixheadError(
                f"The trained model cannot be written to {folder} ({error}). {trainer.where_to_resume()} Free disk "
                "space first."
            ) from error
    trainer.accelerator.wait_for_everyone()
    return folder


def run_training(trainer: RunTrainer[Any], done: int, title: str = "Training", progress: bool = True) -> float:
    """Trains to the end, from the newest checkpoint where `done` steps are done; returns the seconds of the whole run.

    Raises:
        MixheadError: where the loss becomes NaN or the disk is full. The checkpoints that were complete stay.
        KeyboardInterrupt: after Ctrl-C, when the running step has ended and a checkpoint is written.
        SystemExit: with code 143, after SIGTERM, likewise.
    """
    run, main = trainer.run_folder, trainer.accelerator.is_main_process
    checkpoint = str(checkpoints(run)[-1]) if done else None
    steps = trainer.args.max_steps
    log: StepLog | None = None
    try:
        log = StepLog(run / LOG, log_columns(trainer), done) if main else None
        with (
            _no_bars_of_transformers(),
            ProgressBar(title, steps, done, trainer.unit, progress and main) as bar,
            signals_ask(trainer),
        ):
            report = StepReport(trainer, log, bar)
            trainer.add_callback(report)
            trainer.train(resume_from_checkpoint=checkpoint)
    except OSError as error:
        raise MixheadError(f"The run stopped, since {_of_the_system(error)}. {trainer.where_to_resume()}") from error
    finally:
        if log is not None:
            log.close()
    if trainer.state.global_step < steps:
        sentence = f"{title} was stopped after step {trainer.state.global_step} of {steps}. {trainer.where_to_resume()}"
        logger.warning(sentence)
        if trainer.signal_of_all() == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)  # as of a process that the signal ended, which schedulers know
        raise KeyboardInterrupt(sentence)
    return report.seconds


def _of_the_system(error: OSError) -> str:
    """An error of the operating system as the end of a sentence."""
    place = f" ({error.filename})" if error.filename else ""
    return f"the operating system says: {error.strerror or error}{place}"


class StepReport(TrainerCallback):
    """After every optimizer step: is all of it a number, a row in the log, the bar, a wish to stop."""

    def __init__(self, trainer: RunTrainer[Any], log: StepLog | None, bar: ProgressBar) -> None:
        self.trainer, self.log, self.bar = trainer, log, bar
        self.seconds = 0.0 if log is None else log.seconds  # of the whole run
        self.row: dict[str, float | int | None] = {}
        self._clock = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._clock = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the weights change, so that NaN never reaches them."""
        trainer = self.trainer
        row = trainer.finish_step()
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
