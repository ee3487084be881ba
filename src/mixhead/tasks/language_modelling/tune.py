"""`tune`: trains a causal language model, converted or not, on token windows.

A run lives in one folder: `tune.json` (what was asked for), `log.csv` and `tensorboard/` (a row for every optimizer
step), `checkpoint-N/` (to continue from) and, at the end, `model/` (for `from_pretrained`). A run that was killed
continues with `resume=True`, with the same losses as if nothing had happened.

Shape legend of this file: W windows, T tokens in a window.
"""

from __future__ import annotations

import hashlib
import importlib.util
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from mixhead.errors import MixheadError
from mixhead.files import WRITE_ERRORS, write_folder
from mixhead.models.hugging_face import MoHModelMixin
from mixhead.tasks.language_modelling.config import TuneConfig
from mixhead.tasks.language_modelling.trainer import ROUTER, TuneTrainer
from mixhead.training.progress import last_tenth
from mixhead.training.run import LOG, open_run, run_training

__all__ = ["TuneConfig", "TuneResult", "tune"]


@dataclass(frozen=True)
class TuneResult:
    """What `tune` did.

    Attributes:
        model: the tuned model: the one that was given, trained in place (low-rank updates are merged).
        folder: where it was saved, for `from_pretrained`.
        log: the CSV file with one row for every optimizer step.
        steps: optimizer steps of the whole run.
        tokens: tokens read in the whole run.
        seconds: wall time of the whole run, without the time in which it was not running.
        loss: mean cross entropy of the last tenth of the steps, in nats.
        resumed_from: the step after which this call took up the run; 0 for a fresh start.
    """

    model: PreTrainedModel
    folder: Path
    log: Path
    steps: int
    tokens: int
    seconds: float
    loss: float
    resumed_from: int = 0


def tune(
    model: PreTrainedModel,
    windows_WT: Tensor,
    config: TuneConfig | None = None,
    output_dir: str | Path = "tuned",
    teacher: PreTrainedModel | None = None,
    *,
    resume: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = True,
) -> TuneResult:
    """Tunes a causal language model on token windows; its routers too, where it is converted.

    Without routers this is plain fine-tuning: the same call on the original, with the same windows and configuration,
    gives the baseline that a converted model has to be compared with. Several processes: start the program with
    `torchrun --nproc_per_node`.

    Args:
        model: trained in place, on the device that the Trainer of transformers finds.
        windows_WT: token ids, int64 [W, T], as `token_windows` makes them.
        config: how to train.
        output_dir: folder of the run.
        teacher: the model to distil from (usually the original), where `config.distillation_weight` is above 0. It is
            put into evaluation mode and gets no gradient.
        resume: continues the run in `output_dir` after its last checkpoint; `model` must be what it was at the start of
            the run. Where there is no run yet, it starts. False refuses a folder that holds a run.
        tokenizer: saved beside the model.
        progress: shows a bar on standard error (without a terminal: a log line a minute).

    Raises:
        MixheadError: where arguments do not fit together, the loss becomes NaN, or the disk is full. The checkpoints
            that were complete stay.
        KeyboardInterrupt: after Ctrl-C, when the running step has ended and a checkpoint is written.
    """
    config = TuneConfig() if config is None else config
    run = Path(output_dir)
    _check_arguments(model, windows_WT, config, teacher)
    if isinstance(model, MoHModelMixin) and config.balance_coefficient is not None:
        model.config.moh = {**model.config.moh, "balance_coefficient": config.balance_coefficient}
    set_seed(config.seed)
    trained = _with_lora(model, config) if config.lora_rank else model
    with ExitStack() as undo:
        if config.gradient_checkpointing:
            _enable_checkpointing(model)
            undo.callback(_disable_checkpointing, model)
        was_training = model.training
        undo.callback(lambda: model.train(was_training))
        if teacher is not None:
            teacher.eval()
        trainer = TuneTrainer(trained, config, windows_WT, run, teacher)
        done = open_run(trainer, "tune.json", _passport(trainer.base_model, windows_WT, config), resume)
        seconds = run_training(trainer, done, "Tuning", progress)
        merged = trained.merge_and_unload() if config.lora_rank else trained
        folder = _save(trainer, merged, tokenizer)
    trainer.accelerator.wait_for_everyone()
    last = [float(row["cross_entropy"]) for row in last_tenth(run / LOG)]
    return TuneResult(
        model=merged,
        folder=folder,
        log=run / LOG,
        steps=trainer.steps,
        tokens=trainer.steps * trainer.units_per_step,
        seconds=seconds,
        loss=sum(last) / max(len(last), 1),
        resumed_from=done,
    )


def _check_arguments(
    model: PreTrainedModel, windows_WT: Tensor, config: TuneConfig, teacher: PreTrainedModel | None
) -> None:
    if not isinstance(model, PreTrainedModel):
        raise MixheadError(f"mixhead tunes a model of transformers, but this is a {type(model).__name__}.")
    if windows_WT.dim() != 2 or windows_WT.dtype != torch.int64 or windows_WT.shape[0] < 1 or windows_WT.shape[1] < 2:
        raise MixheadError(
            "windows_WT must hold token ids as int64 of shape [windows, tokens], at least one window of two tokens, "
            f"but it is {windows_WT.dtype} of shape {list(windows_WT.shape)}."
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    low, high = int(windows_WT.min()), int(windows_WT.max())
    if low < 0 or high >= vocabulary:
        raise MixheadError(
            f"windows_WT holds the token {low if low < 0 else high}, but the model knows 0 to {vocabulary - 1}: "
            "cut the text with the model's own tokenizer."
        )
    if config.distillation_weight > 0.0 and teacher is None:
        raise MixheadError(
            f"distillation_weight={config.distillation_weight} needs a teacher: give the original model."
        )
    if config.distillation_weight == 0.0 and teacher is not None:
        raise MixheadError("A teacher was given, but distillation_weight is 0: give it a weight, or leave it out.")
    if teacher is model:
        raise MixheadError("The teacher is the model itself, which changes as it learns: load the original once more.")
    if any(p.is_floating_point() and p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()) and (
        config.lora_rank == 0
    ):
        raise MixheadError(
            "The weights are in half precision, where small updates are lost: load the model with dtype=torch.float32 "
            "(bf16=True still computes in bfloat16), or train low-rank updates (lora_rank)."
        )


def _with_lora(model: PreTrainedModel, config: TuneConfig) -> Any:
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
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        target_modules=targets,
        modules_to_save=[ROUTER] if routers else None,
    )
    return get_peft_model(model, lora)


def _enable_checkpointing(model: PreTrainedModel) -> None:
    """Non-reentrant: the reentrant form runs the routers without gradients, and the balance loss would be lost."""
    if not model.supports_gradient_checkpointing:
        raise MixheadError(f"{type(model).__name__} does not support gradient checkpointing.")
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:  # transformers before 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def _disable_checkpointing(model: PreTrainedModel) -> None:
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()


def _passport(model: PreTrainedModel, windows_WT: Tensor, config: TuneConfig) -> dict[str, Any]:
    """What makes this run the one that it is."""
    return {
        "config": asdict(config),
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "windows": list(windows_WT.shape),
        "windows_sha256": hashlib.sha256(windows_WT.contiguous().numpy().tobytes()).hexdigest(),
    }


def _save(trainer: TuneTrainer, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Path:
    folder = trainer.run_folder / "model"

    def write(partial: Path) -> None:
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)

    if trainer.accelerator.is_main_process:
        try:
            write_folder(folder, write)
        except WRITE_ERRORS as error:
            raise MixheadError(
                f"The tuned model cannot be written to {folder} ({error}). {trainer.where_to_resume()} "
                "Free some disk first."
            ) from error
    return folder
