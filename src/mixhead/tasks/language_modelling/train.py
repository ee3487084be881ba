"""Language modelling: a causal language model, converted or not, is tuned on token windows.

`tune` takes models and windows in memory; `build` makes them from a recipe. Both are one training, see
`mixhead.training`.

Shape legend of this file: W windows, T tokens in a window.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from mixhead import store
from mixhead.data.fetch import cache_folder
from mixhead.data.text import text_source
from mixhead.data.windows import token_windows
from mixhead.errors import MixheadError
from mixhead.interop.smollm2 import smollm2_folder
from mixhead.models.context import check_ids, check_length, check_reads_forward, window_for
from mixhead.models.hugging_face import MoHModelMixin
from mixhead.tasks.language_modelling.config import SMOLLM2, WINDOW, LanguageModellingConfig, TuneConfig
from mixhead.tasks.language_modelling.trainer import TuneTrainer
from mixhead.training.progress import last_tenth
from mixhead.training.run import LOG, Metrics, train

__all__ = ["TuneConfig", "TuneResult", "tune"]

logger = logging.getLogger(__name__)


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
        SystemExit: with code 143, after SIGTERM, likewise.
    """
    was_training = model.training
    trainer = tuner(model, windows_WT, config or TuneConfig(), Path(output_dir), teacher, tokenizer)
    try:
        result = train(trainer, "language_modelling", resume, title="Tuning", progress=progress)
    finally:
        model.train(was_training)
        if trainer.config.gradient_checkpointing:
            model.activation_checkpointing_disable()
    steps = trainer.args.max_steps
    return TuneResult(
        model=trainer.merged,
        folder=result.folder,
        log=trainer.run_folder / LOG,
        steps=steps,
        tokens=steps * trainer.units_per_step,
        seconds=result.seconds,
        loss=final_loss(trainer.run_folder),
        resumed_from=result.resumed_from,
    )


def build(config: LanguageModellingConfig, run: Path) -> TuneTrainer:
    """The trainer for a recipe.

    Raises:
        MixheadError: where there is no such model or text, or they do not fit together.
    """
    if (config.teacher is None) != (config.distillation_weight == 0.0):
        raise MixheadError("Distillation needs both: give a teacher and a distillation_weight above 0.")
    documents = text_source(config.text, "train")
    model, tokenizer = store.load_causal_lm(model_folder(config.model))
    check_reads_forward(model)
    teacher = None
    if config.teacher is not None:
        teacher, own = store.load_causal_lm(model_folder(config.teacher))
        if own.get_vocab() != tokenizer.get_vocab():
            raise MixheadError(
                f"{config.teacher} and {config.model} have different tokenizers: distillation needs a teacher that "
                "reads the same tokens."
            )
    models = [model] if teacher is None else [model, teacher]
    window = window_for(models, config.window, WINDOW)
    config = replace(config, window=window)
    windows_WT = token_windows(tokenizer, documents, window)
    return tuner(model, windows_WT, config, run, teacher, tokenizer)


def measure(trainer: TuneTrainer, folder: Path) -> Metrics:
    """The loss of the last steps; `mixhead evaluate` measures on a text that was not trained on."""
    del folder
    tokens = trainer.args.max_steps * trainer.units_per_step
    return {"training tokens": tokens, "last loss (nats)": final_loss(trainer.run_folder)}


def model_folder(name: str) -> Path:
    """The folder that a model's name in a recipe stands for."""
    return smollm2_folder(cache_folder(), say=logger.info) if name == SMOLLM2 else Path(name)


def final_loss(run: Path) -> float:
    """Mean cross entropy of the last tenth of the steps, in nats."""
    last = [float(row["cross_entropy"]) for row in last_tenth(run / LOG)]
    return sum(last) / max(len(last), 1)


def tuner(
    model: PreTrainedModel,
    windows_WT: Tensor,
    config: TuneConfig,
    run: Path,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> TuneTrainer:
    """The trainer of a model, after all has been checked that it is made of."""
    _check_arguments(model, windows_WT, config, teacher)
    if isinstance(model, MoHModelMixin) and config.balance_coefficient is not None:
        model.config.moh = {**model.config.moh, "balance_coefficient": config.balance_coefficient}
    if teacher is not None:
        teacher.eval()
    set_seed(config.seed)
    return TuneTrainer(model, config, windows_WT, run, teacher, tokenizer)


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
    for reader in (model, teacher):
        if reader is not None:
            check_ids(reader, windows_WT)
            check_length(reader, windows_WT.shape[1], "A window")
            check_reads_forward(reader)
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
            "(precision=bfloat16 still computes in it), or train low-rank updates (lora_rank)."
        )
