"""The loss, the optimizer's groups and the order of the data of `tune`, on the trainer of every run."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixhead.data.order import SEED_STRIDE, ShuffledRounds
from mixhead.errors import MixheadError
from mixhead.models.hugging_face import MoHModelMixin, RoutingTrace
from mixhead.models.hugging_face.balance import balance_term, target_share
from mixhead.tasks.language_modelling.config import TuneConfig
from mixhead.tasks.language_modelling.losses import next_token_losses
from mixhead.training.health import HEALTH
from mixhead.training.optimizer import Group
from mixhead.training.trainer import PartOfStep, RunTrainer, Samples

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


class TuneTrainer(RunTrainer[TuneConfig]):
    """The log has, beside the loss that is minimised: the cross entropy and tau^2 KL(teacher || student), both in nats.

    Args:
        model: converted or not; low-rank updates are put onto it where the configuration asks for them.
        config: how to train.
        windows_WT: token ids.
        run: folder of the run.
        teacher: the model to distil from.
        tokenizer: saved beside the model.
    """

    columns = ("loss", "cross_entropy", "distillation", *HEALTH)
    unit = "tokens"

    def __init__(
        self,
        model: PreTrainedModel,
        config: TuneConfig,
        windows_WT: Tensor,
        run: Path,
        teacher: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.windows_WT, self.teacher, self.tokenizer = windows_WT, teacher, tokenizer
        self.router_factor = config.router_learning_rate_factor
        self.merged = model  # what is saved in the end
        samples = Samples(
            dataset=lambda length: WindowOrder(windows_WT, length, config.seed),
            collate=collate,
            steps=lambda per_step: config.tokens // (per_step * windows_WT.shape[1]),
            batch_size=config.batch_size,
            units=windows_WT.shape[1],
        )
        trained = with_lora(model, config.lora_rank) if config.lora_rank else model
        super().__init__(trained, config, samples, run, activation_checkpointing=False)
        if config.gradient_checkpointing:
            # Not left to the Trainer, which would switch it on for good: `tune` switches it off in the end.
            if not model.supports_gradient_checkpointing:
                raise MixheadError(f"{type(model).__name__} does not support gradient checkpointing.")
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.is_converted = isinstance(self.base_model, MoHModelMixin)
        if teacher is not None:
            teacher.to(self.args.device)

    def part_of_step(self, model: nn.Module, inputs: dict[str, Any], targets: Tensor | int | None) -> PartOfStep:
        """(1 - w) cross entropy + w distillation + balance."""
        ids_BT, labels_BT = inputs["input_ids"], inputs["labels"]
        w = self.config.distillation_weight
        trace = RoutingTrace()
        handed_down = {"routing_trace": trace} if self.is_converted else {}
        outputs = model(input_ids=ids_BT, use_cache=False, **handed_down)
        teacher_logits = None
        if self.teacher is not None and w > 0.0:
            with torch.no_grad():
                teacher_logits = self.teacher(input_ids=ids_BT, use_cache=False).logits
        assert targets is not None
        cross_entropy, distillation = next_token_losses(
            outputs.logits, labels_BT, targets, teacher_logits, self.config.distillation_temperature
        )
        loss = (1.0 - w) * cross_entropy + w * distillation
        share: Tensor | float = 1.0
        if self.is_converted:  # not left to `PartOfStep`: this one refuses what cannot train the routers
            step = {"labels": labels_BT, "num_items_in_batch": targets}
            loss = loss + balance_term(self.base_model, trace, step).to(loss)
            share = target_share(self.base_model, step)
        log = {"cross_entropy": cross_entropy, **({"distillation": distillation} if w > 0.0 else {})}
        return PartOfStep(loss, share, log, [routing for _, routing in trace.layers])

    def group_of(self, name: str, parameter: nn.Parameter) -> Group:
        """Routers are a group of their own; what stands in for skipped heads does not decay."""
        if f".{ROUTER}." in name:
            return "router"
        return "keep" if name.endswith(SKIPPED) else super().group_of(name, parameter)

    def fingerprint(self) -> dict[str, Any]:
        """What the model and the windows are."""
        return {
            # A converted model bears the name of its original.
            "architecture": "MoH" * self.is_converted + type(self.base_model).__name__,
            "parameters": sum(p.numel() for p in self.base_model.parameters()),
            "windows": list(self.windows_WT.shape),
            "windows_sha256": hashlib.sha256(self.windows_WT.contiguous().numpy().tobytes()).hexdigest(),
        }

    def gather_weights(self) -> None:
        """Merges low-rank updates."""
        self.merged = self.model.merge_and_unload() if self.config.lora_rank else self.model

    def write_model(self, folder: Path) -> None:
        """The model, and the tokenizer where there is one."""
        self.merged.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def with_lora(model: PreTrainedModel, rank: int) -> Any:
    """The model with low-rank updates at every linear layer but the head and the routers, which train in full."""
    if importlib.util.find_spec("peft") is None:
        raise MixheadError("lora_rank needs the package peft: run `pip install peft`.")
    from peft import LoraConfig, get_peft_model

    head = model.get_output_embeddings()
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and f".{ROUTER}." not in f".{name}."
    ]
    routers = any(ROUTER in name.split(".") for name, _ in model.named_parameters())
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=[ROUTER] if routers else None
    )
    return get_peft_model(model, lora)
