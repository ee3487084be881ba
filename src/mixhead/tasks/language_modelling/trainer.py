"""The `Trainer` of transformers with the loss, the optimizer and the order of the data of `tune`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mixhead.data.order import SEED_STRIDE, ShuffledRounds
from mixhead.errors import MixheadError
from mixhead.models.hugging_face import MoHModelMixin, RoutingTrace
from mixhead.models.hugging_face.balance import balance_term, target_share
from mixhead.tasks.language_modelling.config import TuneConfig
from mixhead.tasks.language_modelling.losses import next_token_losses
from mixhead.training.health import HEALTH
from mixhead.training.trainer import RunMixin, training_arguments

ROUTER = "moh_router"
SKIPPED = "moh_skipped"  # stands in for the output of a skipped head, a bias in all but its shape


class WindowOrder(Dataset[Tensor]):
    """All windows that a run reads, in order: a permutation of them by seed, then the next.

    The order is one list for the whole run, so that a step's windows depend on nothing but seed and step.
    """

    def __init__(self, windows_WT: Tensor, length: int, seed: int) -> None:
        self.windows_WT, self.length = windows_WT, length
        self.order = ShuffledRounds(len(windows_WT), seed * SEED_STRIDE)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return self.windows_WT[self.order[index]]


def collate(windows: list[Tensor]) -> dict[str, Tensor]:
    """Windows to a batch whose targets are its own tokens."""
    ids_BT = torch.stack(windows)
    return {"input_ids": ids_BT, "labels": ids_BT}


class TuneTrainer(RunMixin):
    """Differs from the stock Trainer in what its methods say, and in nothing else.

    The log has, beside the loss that is minimised: the cross entropy and tau^2 KL(teacher || student), both in nats.
    """

    columns = ("loss", "cross_entropy", "distillation", *HEALTH)
    unit = "tokens"

    def __init__(
        self, model: nn.Module, config: TuneConfig, windows_WT: Tensor, run: Path, teacher: nn.Module | None
    ) -> None:
        self.tuning, self.teacher = config, teacher
        self.keep_checkpoints, self.bf16 = config.keep_checkpoints, config.bf16
        per_step = config.batch_size * config.gradient_accumulation
        arguments = training_arguments(
            run,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            max_steps=1,  # set below: it depends on the number of processes, which these arguments find out
            max_grad_norm=config.max_grad_norm,
            save_steps=config.save_every,
            seed=config.seed,
            average_tokens_across_devices=True,
        )
        self.units_per_step = per_step * arguments.world_size * windows_WT.shape[1]
        self.steps = config.tokens // self.units_per_step
        if self.steps == 0:
            raise MixheadError(
                f"tokens={config.tokens:,} does not reach for one optimizer step, which reads {self.units_per_step:,} "
                f"tokens ({per_step * arguments.world_size} windows of {windows_WT.shape[1]})."
            )
        arguments.max_steps = self.steps
        self.learning_rate_factor = partial(config.factor, steps=self.steps)
        order = WindowOrder(windows_WT, self.steps * per_step * arguments.world_size, config.seed)
        super().__init__(model=model, args=arguments, train_dataset=order, data_collator=collate)
        self.is_converted = isinstance(self.base_model, MoHModelMixin)
        if teacher is not None:
            teacher.to(arguments.device)

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
        if self.is_converted:
            step = {"labels": labels_BT, "num_items_in_batch": num_items_in_batch}
            loss = loss + balance_term(self.base_model, trace, step).to(loss)
            self.note_routings([routing for _, routing in trace.layers], target_share(self.base_model, step))
        # Both are this micro-batch's part of the step's mean already.
        self.note(1.0, loss=loss, cross_entropy=cross_entropy)
        if w > 0.0:
            self.note(1.0, distillation=distillation)
        # Each process has its share of the sum over all of them, and their gradients are averaged.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def step_row(self, parts: dict[str, float]) -> dict[str, float]:  # type: ignore[override]
        """The learning rate is that of the weights, not of the routers."""
        assert self.optimizer is not None
        rates = {group["kind"]: group["lr"] for group in self.optimizer.param_groups}
        of_routers = rates.get("router", 0.0) / (self.tuning.router_learning_rate_factor or 1.0)
        return {**parts, "learning_rate": rates.get("decay", rates.get("keep", of_routers))}

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
