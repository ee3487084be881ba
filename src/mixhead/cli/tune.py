"""`mixhead tune`: trains a model, and its routers where it is converted, on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixhead.cli.common import MODEL_HELP, TEXT_HELP, console, model_folder, windows_of
from mixhead.errors import MixheadError
from mixhead.tasks.language_modelling.config import TuneConfig

DEFAULTS = TuneConfig()


def tune(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    run: Annotated[Path, typer.Argument(help="Folder of the run: checkpoints, log.csv and, at the end, the model.")],
    text: Annotated[str, typer.Option(help="Text to tune on. " + TEXT_HELP)] = "addresses:train",
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to read.")] = DEFAULTS.tokens,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in one forward pass.")] = DEFAULTS.batch_size,
    gradient_accumulation: Annotated[
        int, typer.Option(min=1, help="Forward passes in one optimizer step.")
    ] = DEFAULTS.gradient_accumulation,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate of AdamW.")] = DEFAULTS.learning_rate,
    final_learning_rate: Annotated[
        float, typer.Option(help="Learning rate of the last step.")
    ] = DEFAULTS.final_learning_rate,
    balance: Annotated[
        float | None, typer.Option(help="Weight of the balance loss; by default what convert --balance gave the model.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="A model to distil from, usually the original.")] = None,
    distillation: Annotated[float, typer.Option(help="Share of the distillation in the loss, 0 to 1.")] = 0.0,
    lora_rank: Annotated[int, typer.Option(min=0, help="Train low-rank updates only; 0 trains every weight.")] = 0,
    bf16: Annotated[
        bool | None,
        typer.Option(help="Forward passes under autocast to bfloat16; by default where the machine is faster in it."),
    ] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Less memory, a third slower.")] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Optimizer steps between checkpoints.")] = DEFAULTS.save_every,
    seed: Annotated[int, typer.Option(help="Seed of the order of the windows.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in RUN.")] = False,
) -> None:
    """Tunes a dense or converted causal language model; Ctrl-C leaves a run that --resume continues."""
    from mixhead import store
    from mixhead.report.plots import plot_health
    from mixhead.tasks.language_modelling.tune import tune as tune_model

    if (teacher is None) != (distillation == 0.0):
        raise MixheadError("Distillation needs both: give --teacher and a --distillation above 0.")
    config = TuneConfig(
        tokens=tokens,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        learning_rate=learning_rate,
        final_learning_rate=min(final_learning_rate, learning_rate),
        distillation_weight=distillation,
        lora_rank=lora_rank,
        balance_coefficient=balance,
        bf16="auto" if bf16 is None else bf16,
        gradient_checkpointing=checkpointing,
        save_every=save_every,
        seed=seed,
    )
    network, tokenizer = store.load_causal_lm(model_folder(model))
    windows_WT = windows_of(tokenizer, text, "train", window, None)
    original = None if teacher is None else store.load_causal_lm(model_folder(teacher))[0]
    result = tune_model(network, windows_WT, config, run, original, resume=resume, tokenizer=tokenizer)
    picture = plot_health(result.log)
    console.print(
        f"Tuned on {result.tokens:,} tokens in {result.seconds:,.0f} s; last loss {result.loss:.3f} nats. "
        f"The model is in {result.folder}, the log in {result.log}"
        + (f", the health of its routing in {picture}." if picture else ".")
    )
