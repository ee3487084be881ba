"""What every training run has, on top of the `Trainer` of transformers.

A run lives in one folder: `recipe.yaml` (what was asked for, with all settings), `fingerprint.json` (what it is trained
on), `log.csv` and `tensorboard/` (a row for every optimizer step), `checkpoint-N/` (to continue from) and, at the end,
`model/`. A run that was killed or stopped with Ctrl-C continues with the same losses as if nothing had happened; a loss
that is no number stops it before the weights change.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mixhead.errors import MixheadError, first_line
from mixhead.files import WRITE_ERRORS, remove, write_folder
from mixhead.routing import Routing, mean_balance_loss
from mixhead.training.checkpoints import PREFIX, checkpoints, damaged, load_weights, step_of, write_sums
from mixhead.training.config import RunConfig
from mixhead.training.health import HEALTH, layer_columns, routing_health
from mixhead.training.optimizer import Group, adamw, schedule
from mixhead.training.signals import leave_signals

Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class Samples:
    """What a run reads.

    Attributes:
        dataset: from the number of samples of the whole run to its data set; entry i is the i-th that is read.
        collate: from samples to a batch, by the names of the model's arguments.
        steps: from the samples that an optimizer step reads to the number of steps.
        batch_size: samples in one forward pass of one process.
        units: how many of the trainer's `unit` a sample counts.
    """

    dataset: Callable[[int], Dataset[Any]]
    collate: Callable[[list[Any]], dict[str, Any]]
    steps: Callable[[int], int]
    batch_size: int = 1
    units: float = 1.0


@dataclass(frozen=True)
class PartOfStep:
    """What a micro-batch adds to its optimizer step; every value is its part of the step's mean.

    Attributes:
        loss: of the task, with its gradient.
        share: the weight of the micro-batch in the step.
        log: further columns of the log.
        routings: of the layers: their health is logged, and their balance loss is added to the loss.
        balance_coefficient: weight of the balance loss.
    """

    loss: Tensor
    share: Tensor | float
    log: Mapping[str, Tensor | float] = field(default_factory=dict)
    routings: Sequence[Routing] = ()
    balance_coefficient: float = 0.0


def training_arguments(run: Path, config: RunConfig, batch_size: int, **settings: Any) -> TrainingArguments:
    """Arguments of a Trainer that reports through `run_training` alone and sends nothing anywhere.

    Raises:
        MixheadError: where several processes were started that would each train alone.
    """
    accelerated = torch.accelerator.is_available()
    arguments = TrainingArguments(
        output_dir=str(run),
        **{
            "max_steps": 1,  # set later: it depends on the number of processes, which these arguments find out
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation,
            "max_grad_norm": config.max_grad_norm or float("inf"),
            "seed": config.seed,
            "dataloader_num_workers": config.dataloader_workers,
            "dataloader_persistent_workers": config.dataloader_workers > 0,
            "activation_checkpointing": config.gradient_checkpointing,
            # Not reentrant: that form runs the routers without gradients, and their losses would be lost.
            "activation_checkpointing_kwargs": {"use_reentrant": False},
            "average_tokens_across_devices": True,
            "logging_strategy": "no",
            "eval_strategy": "no",
            "save_strategy": "steps",
            "save_steps": max(round(config.save_every), 1),
            "train_sampling_strategy": "sequential",  # the data sets know their order
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "ddp_find_unused_parameters": False,
            # Said outright: without it several processes on a machine without accelerator would each train alone.
            "use_cpu": not accelerated,
            "dataloader_pin_memory": accelerated,
            **settings,
        },
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != arguments.world_size:
        raise MixheadError(
            f"The program was started as one of {started} processes, but only {arguments.world_size} would train "
            "together: start it with `torchrun --nproc_per_node`, and give every process a device."
        )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs in one process would split the batch: use torchrun
    return arguments


class RunTrainer(Trainer, Generic[Config]):
    """A Trainer whose subclass says what a model costs (`part_of_step`) and how it is saved (`write_model`).

    Args:
        model: trained in place.
        config: how to train.
        samples: what it reads.
        run: folder of the run.
        **settings: of `TrainingArguments`, where they differ from `training_arguments`.

    Attributes:
        columns: names of what is logged, in order.
        unit: what `units_per_step` counts, in the plural ("tokens", "images").
        units_per_step: how many of them one optimizer step of all processes reads.
        adam: settings of AdamW that differ from PyTorch's.
        router_factor: the routers' learning rate as a multiple of all others'.
        bfloat16: whether losses are computed under autocast to bfloat16; `opened_run` decides it.
    """

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LambdaLR | None

    columns: Sequence[str] = ("loss", *HEALTH)
    unit = "samples"
    adam: ClassVar[Mapping[str, Any]] = {}
    router_factor = 1.0

    def __init__(self, model: nn.Module, config: Config, samples: Samples, run: Path, **settings: Any) -> None:
        self.config = config
        arguments = training_arguments(run, config, samples.batch_size, **settings)
        per_step = samples.batch_size * config.gradient_accumulation * arguments.world_size
        arguments.max_steps = samples.steps(per_step)
        self.units_per_step = round(per_step * samples.units)
        if arguments.max_steps < 1:
            raise MixheadError(
                f"The run is too short for one optimizer step, which reads {self.units_per_step:,} {self.unit}."
            )
        dataset = samples.dataset(arguments.max_steps * per_step)
        try:
            super().__init__(model=model, args=arguments, train_dataset=dataset, data_collator=samples.collate)
        except OSError as error:
            raise MixheadError(f"The folder of the run cannot be made ({error}).") from error
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.loss_is_scaled_for_ga = True  # `compute_loss` returns a micro-batch's share of the step's mean
        self.run_folder = run
        self.bfloat16 = False
        self.gradient_norm: float | None = None
        self.interrupted = False  # this process was asked to stop
        self.signal = 0  # by which signal
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

    # What a task says

    def part_of_step(self, model: nn.Module, inputs: dict[str, Any], targets: Tensor | int | None) -> PartOfStep:
        """What a micro-batch adds to its optimizer step.

        Args:
            model: as the Trainer wrapped it.
            inputs: the batch.
            targets: labels of the whole step that are to be predicted; None where a batch has no `labels`.
        """
        raise NotImplementedError

    def write_model(self, folder: Path) -> None:
        """Writes the trained model and what belongs to it into an empty folder."""
        raise NotImplementedError

    def gather_weights(self) -> None:
        """What all processes have to do before the first one writes the model."""

    def group_of(self, name: str, parameter: nn.Parameter) -> Group:
        """Whether a weight decays: matrices do, biases and norms do not."""
        del name
        return "decay" if parameter.dim() > 1 else "keep"

    def fingerprint(self) -> dict[str, Any]:
        """What makes this run the one that it is, beside its settings; in the form of JSON."""
        return {}

    # What a step consists of

    @property
    def equal_share(self) -> float:
        """A micro-batch's share of its optimizer step, where every sample counts alike."""
        steps = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        return 1.0 / (int(steps) * self.accelerator.num_processes)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The task's loss and the balance loss of its routings, as this micro-batch's share of the step's mean."""
        del return_outputs
        part = self.part_of_step(model, inputs, num_items_in_batch)
        loss = part.loss
        balance = mean_balance_loss(part.routings) if part.balance_coefficient else None
        if balance is not None:
            loss = loss + part.balance_coefficient * balance * part.share
        with torch.no_grad():
            health = routing_health(part.routings, self.layer_columns)
            self.note(loss=loss, **part.log, **{name: value * part.share for name, value in health.items()})
        # Each process has its share of the sum over all of them, and their gradients are averaged.
        return loss * self.accelerator.num_processes

    def note(self, **values: Tensor | float) -> None:
        """Adds a micro-batch's part to the step's means."""
        for name, value in values.items():
            self._noted.add(name)
            self._parts[self.columns.index(name)] += value

    def finish_step(self) -> dict[str, float]:
        """What was noted for the step that ends, over all processes, and its learning rate."""
        self._parts[-1] = float(self.interrupted)
        *parts, requests = self.accelerator.reduce(self._parts, "sum").tolist()
        self._parts = torch.zeros_like(self._parts)
        self.stopping = requests > 0
        noted = {name: value for name, value in zip(self.columns, parts, strict=True) if name in self._noted}
        assert self.lr_scheduler is not None
        [factor, *_], step = self.lr_scheduler.lr_lambdas, self.lr_scheduler.last_epoch
        return {**noted, "learning_rate": self.config.learning_rate * factor(step)}

    def signal_of_all(self) -> int:
        """The signal that stopped any process: SIGTERM, the larger number, counts before Ctrl-C."""
        return int(self.accelerator.gather(torch.tensor([self.signal], device=self.args.device)).max())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, see `adamw`."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            self.optimizer = adamw(trained, self.config, self.group_of, self.router_factor, **self.adam)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The learning rates that the configuration asks for."""
        if self.lr_scheduler is None:
            optimizer = self.create_optimizer() if optimizer is None else optimizer
            self.lr_scheduler = schedule(optimizer, self.config, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Processes that read data leave signals to the one that trains: terminals and schedulers send them to all."""
        loader = super().get_train_dataloader()
        if self.args.dataloader_num_workers:
            inner = getattr(loader, "base_dataloader", loader)  # in that of accelerate
            inner.worker_init_fn = partial(leave_signals, inner.worker_init_fn)
        return loader

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[Any]:
        """Around the loss alone. The wrapper of accelerate would copy the logits to float32 as well."""
        if not self.bfloat16:
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
                write_folder(self.run_folder / name, lambda folder: _move_and_list(partial / name, folder))
                for old in checkpoints(self.run_folder)[: -self.config.keep_checkpoints]:
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
            super()._load_optimizer_and_scheduler(checkpoint)
        except Exception as error:  # a damaged file surfaces as whatever its reader trips over
            if "optimizer's group" in str(error) or "parameter groups" in str(error):
                raise MixheadError(
                    f"The checkpoint {checkpoint} is of an earlier version, whose optimizer grouped the weights in "
                    "another way: finish the run with that version, or begin it again in another folder."
                ) from error
            raise damaged(Path(checkpoint), first_line(error)) from error

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Without its random state a run would take another course; the stock method would not say so."""
        if checkpoint is None:
            return
        processes, number = self.args.world_size, self.args.process_index
        name = "rng_state.pth" if processes == 1 else f"rng_state_{number}.pth"
        try:
            (Path(checkpoint) / name).stat()
            super()._load_rng_state(checkpoint)
        except Exception as error:  # as above
            raise damaged(Path(checkpoint), f"{name}: {first_line(error)}") from error


def _move_and_list(source: Path, target: Path) -> None:
    for path in source.iterdir():
        path.rename(target / path.name)
    write_sums(target)
