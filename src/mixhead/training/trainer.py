"""What every training run of mixhead has, on top of a `Trainer` of transformers.

A run lives in one folder: a manifest of what was asked for (`recipe.yaml` or `tune.json`), `log.csv` and `tensorboard/`
(a row for every optimizer step), `checkpoint-N/` (to continue from) and, at the end, `model/`. A run that was killed or
stopped with Ctrl-C continues with the same losses as if nothing had happened; a loss that is no number stops it before
the weights change.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mixhead.errors import MixheadError
from mixhead.files import WRITE_ERRORS, remove, write_folder
from mixhead.precision import Bf16
from mixhead.routing import Routing
from mixhead.training.checkpoints import PREFIX, checkpoints, damaged, load_weights, step_of
from mixhead.training.health import HEALTH as HEALTH
from mixhead.training.health import layer_columns, routing_health

# Not reentrant: that form runs the routers without gradients, and their losses would be lost.
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


@dataclass(frozen=True)
class TrainingResult:
    """What a task returns when its training has ended.

    Attributes:
        folder: the trained model, for `from_pretrained`.
        metrics: what was measured at the end, in the order in which it is shown.
    """

    folder: Path
    metrics: Mapping[str, float | int | str] = field(default_factory=dict)


def training_arguments(
    run: Path, kind: type[TrainingArguments] = TrainingArguments, /, **settings: Any
) -> TrainingArguments:
    """Arguments of a Trainer that reports through `run_training` alone and sends nothing anywhere.

    Raises:
        MixheadError: where several processes were started that would each train alone.
    """
    accelerated = torch.accelerator.is_available()
    defaults = {
        "logging_strategy": "no",
        "eval_strategy": "no",
        "save_strategy": "steps",
        "train_sampling_strategy": "sequential",  # the data sets know their order
        "dataloader_persistent_workers": settings.get("dataloader_num_workers", 0) > 0,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        # Said outright: without it several processes on a machine without accelerator would each train alone.
        "use_cpu": not accelerated,
        "dataloader_pin_memory": accelerated,
    }
    arguments = kind(output_dir=str(run), **{**defaults, **settings})
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != arguments.world_size:
        raise MixheadError(
            f"The program was started as one of {started} processes, but only {arguments.world_size} would train "
            "together: start it with `torchrun --nproc_per_node`, and give every process a device."
        )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs in one process would split the batch: use torchrun
    return arguments


class RunMixin(Trainer):
    """Goes before a Trainer of transformers in the bases of a class; that class says what its loss consists of.

    `max_steps` of its arguments says how long it trains. Its `compute_loss` calls `note(share, loss=...)` for every
    micro-batch, `note_routings` where heads compete, and `columns` lists what it notes.

    Attributes:
        columns: names of what is noted, in the order of the log.
        unit: what `units_per_step` counts, in the plural ("tokens", "images").
        units_per_step: how many of them one optimizer step of all processes reads.
        keep_checkpoints: how many of the newest checkpoints stay on the disk.
        bf16: whether the loss is to be computed under autocast to bfloat16; "auto" as this machine, or the run that is
            continued, has it.
        bf16_autocast: whether it is; `open_run` settles that.
        former_bf16: what runs of earlier versions did that do not say it.
        learning_rate_factor: from a step (counted from 0) to its share of the learning rate; without it the schedule
            is the one that the arguments name.
    """

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None

    columns: Sequence[str] = ("loss", *HEALTH)
    unit = "samples"
    units_per_step = 1
    keep_checkpoints = 2
    bf16: Bf16 = False
    bf16_autocast = False
    former_bf16 = False
    learning_rate_factor: Callable[[int], float] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except OSError as error:
            raise MixheadError(f"The folder of the run cannot be made ({error}).") from error
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.run_folder = Path(self.args.output_dir)
        self.gradient_norm: float | None = None
        self.interrupted = False  # this process was asked to stop
        self.stopping = False  # all processes agreed to stop after this step
        # With the entropy of every layer that routes, which the class cannot know.
        self.layer_columns = layer_columns(self.model)
        self.columns = (*self.columns, *self.layer_columns)
        self._noted: set[str] = set()
        self._parts = torch.zeros(len(self.columns) + 1, device=self.args.device)
        self._saving_to: Path | None = None

    @property
    def base_model(self) -> PreTrainedModel:
        """The model without what distribution and PEFT wrap around it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    # What a step consists of

    @property
    def equal_share(self) -> float:
        """A micro-batch's share of its optimizer step, where every sample counts alike."""
        steps = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        return 1.0 / (int(steps) * self.accelerator.num_processes)

    @torch.no_grad()
    def note(self, share: Tensor | float, **values: Tensor | float) -> None:
        """Adds a micro-batch's part to the step's means; `share` is its weight in them."""
        for name, value in values.items():
            self._noted.add(name)
            self._parts[self.columns.index(name)] += value * share

    @torch.no_grad()
    def note_routings(self, routings: Sequence[Routing], share: Tensor | float) -> None:
        """Adds the balance loss (mean of the layers, without its coefficient) and the health of the routing."""
        self.note(share, **routing_health(routings, self.layer_columns))

    def finish_step(self) -> dict[str, float]:
        """What was noted for the step that ends, over all processes."""
        self._parts[-1] = float(self.interrupted)
        *parts, requests = self.accelerator.reduce(self._parts, "sum").tolist()
        self._parts = torch.zeros_like(self._parts)
        self.stopping = requests > 0
        return {name: value for name, value in zip(self.columns, parts, strict=True) if name in self._noted}

    def step_row(self, parts: Mapping[str, float]) -> dict[str, float]:
        """The step's row in the log; its `loss` is what must be a number."""
        assert self.optimizer is not None
        return {**parts, "learning_rate": max(group["lr"] for group in self.optimizer.param_groups)}

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rates by `learning_rate_factor`."""
        if self.learning_rate_factor is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            optimizer = self.create_optimizer() if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[Any]:
        """Around the loss alone. The wrapper of accelerate would copy the logits to float32 as well."""
        if not self.bf16_autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, torch.bfloat16, cache_enabled=bool(cache_enabled))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Keeps the norm for the log."""
        norm = super()._clip_grad_norm(model)
        self.gradient_norm = float(norm)
        return norm

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._saving_to is None else str(self._saving_to)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes under a temporary name, renames, and only then deletes older checkpoints."""
        name = f"{PREFIX}{self.state.global_step}"
        partial = self.run_folder / f".{name}.partial"
        try:
            self._saving_to = partial
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (partial / name / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
                write_folder(self.run_folder / name, lambda folder: _move_files(partial / name, folder))
                for old in checkpoints(self.run_folder)[: -self.keep_checkpoints]:
                    remove(old)
        except WRITE_ERRORS as error:
            raise MixheadError(
                f"The checkpoint of step {self.state.global_step} cannot be written to {self.run_folder} ({error}). "
                f"{self.where_to_resume()} Free some disk first."
            ) from error
        finally:
            self._saving_to = None
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def where_to_resume(self) -> str:
        """A sentence that says what is safe and how to go on from there."""
        complete = checkpoints(self.run_folder)
        if not complete:
            return f"No checkpoint was written yet in {self.run_folder}: the run has to start again."
        last = complete[-1]
        return f"The checkpoint {last} is complete: resume=True (--resume) continues after step {step_of(last)}."

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Safetensors only. The stock method would also read the configuration, which converted models guard."""
        checkpoint = Path(resume_from_checkpoint)
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise damaged(checkpoint, error) from error
        if isinstance(self.model, PreTrainedModel):
            load_weights(self.model, checkpoint)
            return
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except Exception as error:
            raise damaged(checkpoint, error) from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        try:
            for name in ("optimizer.pt", "scheduler.pt"):
                (Path(checkpoint) / name).stat()  # the stock method starts afresh without them
            super()._load_optimizer_and_scheduler(checkpoint)
        except Exception as error:  # a damaged file surfaces as whatever its reader trips over
            raise damaged(Path(checkpoint), f"{type(error).__name__}: {error}") from error


def _move_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        path.rename(target / path.name)
