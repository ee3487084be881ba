"""The `Trainer` of transformers with the loss, the optimizer, the order of the data and the checkpoints of `tune`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mixhead.errors import MixheadError
from mixhead.models.hugging_face import MoHModelMixin, RoutingTrace
from mixhead.models.hugging_face.model import balance_term, target_share
from mixhead.tasks.checkpoints import (
    PREFIX,
    WRITE_ERRORS,
    checkpoints,
    damaged,
    load_weights,
    remove,
    step_of,
    write_folder,
)
from mixhead.tasks.distill import next_token_losses
from mixhead.tasks.progress import ProgressBar, StepLog, routing_health
from mixhead.tasks.tune_config import TuneConfig

COLUMNS = (
    "step",  # optimizer steps done, from 1
    "tokens",  # read so far
    "loss",  # what is minimised
    "cross_entropy",  # nats
    "distillation",  # tau^2 KL(teacher || student), nats
    "balance",  # balance loss, mean of the layers, without its coefficient
    "smallest_load",  # share of the tokens that use the least used competing head, mean of the layers
    "largest_load",
    "load_entropy",  # relative to that of even loads
    "gradient_norm",  # before clipping
    "learning_rate",
    "tokens_per_second",  # of this step
    "seconds",  # since the start of the run, without the time in which it was not running
)
ROUTER = "moh_router"
SKIPPED = "moh_skipped"  # stands in for the output of a skipped head, a bias in all but its shape
_PARTS = 7  # numbers that each micro-batch contributes to: three losses, three of routing health, a request to stop


class WindowOrder(Dataset[Tensor]):
    """All windows that a run reads, in order: a permutation of them by seed, then the next.

    The order is one list for the whole run, so that a step's windows depend on nothing but seed and step.
    """

    def __init__(self, windows_WT: Tensor, length: int, seed: int) -> None:
        self.windows_WT, self.length, self.seed = windows_WT, length, seed
        self._round, self._order_W = -1, torch.empty(0)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        number, place = divmod(index, len(self.windows_WT))
        if number != self._round:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            self._round, self._order_W = number, torch.randperm(len(self.windows_WT), generator=generator)
        return self.windows_WT[self._order_W[place]]


def collate(windows: list[Tensor]) -> dict[str, Tensor]:
    """Windows to a batch whose targets are its own tokens."""
    ids_BT = torch.stack(windows)
    return {"input_ids": ids_BT, "labels": ids_BT}


class TuneTrainer(Trainer):
    """Differs from the stock Trainer in what its methods say, and in nothing else."""

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None

    def __init__(
        self, model: nn.Module, config: TuneConfig, windows_WT: Tensor, run: Path, teacher: nn.Module | None
    ) -> None:
        self.tuning, self.run_folder, self.teacher = config, run, teacher
        per_step = config.batch_size * config.gradient_accumulation
        arguments = TrainingArguments(
            output_dir=str(run),
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            max_steps=1,  # set below: it depends on the number of processes, which these arguments find out
            max_grad_norm=config.max_grad_norm,
            save_strategy="steps",
            save_steps=config.save_every,
            logging_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=config.seed,
            remove_unused_columns=False,
            average_tokens_across_devices=True,
            ddp_find_unused_parameters=False,
            # Said outright: without it several processes on a machine without accelerator would each train alone.
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.accelerator.is_available(),
        )
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != arguments.world_size:
            raise MixheadError(
                f"The program was started as one of {started} processes, but only {arguments.world_size} would train "
                "together: start it with `torchrun --nproc_per_node`, and give every process a device."
            )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs in one process would split the windows: use torchrun
        self.tokens_per_step = per_step * arguments.world_size * windows_WT.shape[1]
        self.steps = config.tokens // self.tokens_per_step
        if self.steps == 0:
            raise MixheadError(
                f"tokens={config.tokens:,} does not reach for one optimizer step, which reads {self.tokens_per_step:,} "
                f"tokens ({per_step * arguments.world_size} windows of {windows_WT.shape[1]})."
            )
        arguments.max_steps = self.steps
        order = WindowOrder(windows_WT, self.steps * per_step * arguments.world_size, config.seed)
        super().__init__(model=model, args=arguments, train_dataset=order, data_collator=collate)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.is_converted = isinstance(self.base_model, MoHModelMixin)
        self.gradient_norm: float | None = None
        self.interrupted = False  # this process was asked to stop
        self.stopping = False  # all processes agreed to stop after this step
        self._routes = False
        self._parts = torch.zeros(_PARTS, device=arguments.device)
        self._saving_to: Path | None = None
        if teacher is not None:
            teacher.to(arguments.device)

    @property
    def base_model(self) -> PreTrainedModel:
        """The model without what distribution and PEFT wrap around it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    # Loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """(1 - w) cross entropy + w distillation + balance, each as this micro-batch's share of the step's mean."""
        ids_BT, labels_BT = inputs["input_ids"], inputs["labels"]
        w = self.tuning.distillation_weight
        trace = RoutingTrace()
        handed_down = {"routing_trace": trace} if self.is_converted else {}
        outputs = model(input_ids=ids_BT, use_cache=False, **handed_down)
        teacher_logits = None
        if self.teacher is not None and w > 0.0:
            with torch.no_grad():
                teacher_logits = self.teacher(input_ids=ids_BT, use_cache=False).logits
        cross_entropy, distillation = next_token_losses(
            outputs.logits, labels_BT, num_items_in_batch, teacher_logits, self.tuning.distillation_temperature
        )
        loss = (1.0 - w) * cross_entropy + w * distillation
        share: Tensor | float = 0.0
        if self.is_converted:
            step = {"labels": labels_BT, "num_items_in_batch": num_items_in_batch}
            loss = loss + balance_term(self.base_model, trace, step).to(loss)
            share = target_share(self.base_model, step)
        self._note(cross_entropy, distillation, trace, share)
        # Each process has its share of the sum over all of them, and their gradients are averaged.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _note(self, cross_entropy: Tensor, distillation: Tensor, trace: RoutingTrace, share: Tensor | float) -> None:
        self._parts[0] += cross_entropy
        self._parts[1] += distillation
        health_3 = routing_health(trace)
        if health_3 is not None:
            balance = trace.balance_loss()
            assert balance is not None
            self._routes = True
            self._parts[2] += balance * share
            self._parts[3:6] += health_3 * share

    def finish_step(self) -> list[float | None]:
        """The parts of the step's loss and its routing health, over all processes; None where there is none."""
        self._parts[6] = float(self.interrupted)
        *parts, requests = self.accelerator.reduce(self._parts, "sum").tolist()
        self._parts = torch.zeros_like(self._parts)
        self.stopping = requests > 0
        distils = self.tuning.distillation_weight > 0.0
        return [parts[0], parts[1] if distils else None, *(parts[2:] if self._routes else [None] * 4)]

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[Any]:
        """Around the loss alone. The wrapper of accelerate would copy the logits to float32 as well."""
        if not self.tuning.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, torch.bfloat16, cache_enabled=bool(cache_enabled))

    # Data and optimizer

    def get_train_dataloader(self) -> DataLoader[Tensor]:
        """The windows in the order of `WindowOrder`."""
        assert isinstance(self.train_dataset, WindowOrder)
        loader = DataLoader(
            self.train_dataset,
            self.tuning.batch_size,
            sampler=SequentialSampler(self.train_dataset),
            collate_fn=collate,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with three kinds of parameters: those that decay, those that do not, the routers'."""
        if self.optimizer is not None:
            return self.optimizer
        kinds: dict[str, list[nn.Parameter]] = {"decay": [], "keep": [], "router": []}
        for name, parameter in (self.model if model is None else model).named_parameters():
            if parameter.requires_grad:
                constant = parameter.dim() < 2 or name.endswith(SKIPPED)
                kind = "router" if f".{ROUTER}." in name else "keep" if constant else "decay"
                kinds[kind].append(parameter)
        rate = self.tuning.learning_rate
        groups = [
            {
                "params": parameters,
                "kind": kind,
                "lr": rate * (self.tuning.router_learning_rate_factor if kind == "router" else 1.0),
                "weight_decay": self.tuning.weight_decay if kind == "decay" else 0.0,
            }
            for kind, parameters in kinds.items()
            if parameters
        ]
        if not groups:
            raise MixheadError("The model has no parameter that requires a gradient, so there is nothing to tune.")
        fused = self.args.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(groups, lr=rate, fused=fused)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rates by `TuneConfig.factor`."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.create_optimizer() if optimizer is None else optimizer,
                lambda step: self.tuning.factor(step, num_training_steps),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

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
                for old in checkpoints(self.run_folder)[: -self.tuning.keep_checkpoints]:
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


class StepReport(TrainerCallback):
    """After every optimizer step: is all of it a number, a row in the log, the bar, a wish to stop."""

    def __init__(self, trainer: TuneTrainer, log: StepLog | None, bar: ProgressBar) -> None:
        self.trainer, self.log, self.bar = trainer, log, bar
        self.seconds = 0.0 if log is None else log.seconds  # of the whole run
        self.row: dict[str, float | int | None] = {}
        self._clock = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._clock = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the weights change, so that NaN never reaches them."""
        trainer = self.trainer
        cross_entropy, distillation, balance, smallest, largest, entropy = trainer.finish_step()
        assert cross_entropy is not None
        w = trainer.tuning.distillation_weight
        loss = (1.0 - w) * cross_entropy + w * (distillation or 0.0)
        if balance is not None:
            loss += trainer.base_model.config.moh["balance_coefficient"] * balance
        norm = trainer.gradient_norm
        if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
            what = f"loss became {loss}" if not math.isfinite(loss) else f"norm of the gradients became {norm}"
            raise MixheadError(
                f"The {what} at step {state.global_step + 1}, so tuning stopped before it reached the weights. "
                f"{trainer.where_to_resume()} A lower learning rate or a lower router learning rate may help; so may "
                "looking for NaN in the model that you started from."
            )
        assert trainer.optimizer is not None
        rates = {group["kind"]: group["lr"] for group in trainer.optimizer.param_groups}
        router_factor = trainer.tuning.router_learning_rate_factor or 1.0
        self.row = {
            "loss": loss,
            "cross_entropy": cross_entropy,
            "distillation": distillation,
            "balance": balance,
            "smallest_load": smallest,
            "largest_load": largest,
            "load_entropy": entropy,
            "gradient_norm": norm,
            "learning_rate": rates.get("decay", rates.get("keep", rates.get("router", 0.0) / router_factor)),
        }

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The row of the step that ended."""
        now = time.perf_counter()
        took, self._clock = now - self._clock, now
        self.seconds += took
        tokens = self.trainer.tokens_per_step
        if self.log is not None:
            self.row |= {
                "step": state.global_step,
                "tokens": state.global_step * tokens,
                "tokens_per_second": tokens / max(took, 1e-9),
                "seconds": self.seconds,
            }
            self.log.write(self.row)
            loss = self.row["loss"]
            assert loss is not None
            self.bar.update(state.global_step, loss, tokens)
        alone = self.trainer.accelerator.num_processes == 1
        if self.trainer.stopping or (alone and self.trainer.interrupted):
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writing a checkpoint is not time of the next step."""
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now
