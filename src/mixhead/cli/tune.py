"""`mixhead tune`: trains a model, and its routers where it is converted, on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixhead.cli.common import MODEL_HELP, TEXT_HELP, WINDOW_HELP, console
from mixhead.tasks.language_modelling.config import TuneConfig


def tune(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    run: Annotated[Path, typer.Argument(help="Folder of the run: checkpoints, log.csv and, at the end, the model.")],
    text: Annotated[str, typer.Option(help="Text to tune on. " + TEXT_HELP)] = "addresses:train",
    window: Annotated[int | None, typer.Option(min=2, help=WINDOW_HELP)] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to read.")] = TuneConfig.tokens,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in one forward pass.")] = TuneConfig.batch_size,
    gradient_accumulation: Annotated[
        int, typer.Option(min=1, help="Forward passes in one optimizer step.")
    ] = TuneConfig.gradient_accumulation,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate of AdamW.")] = TuneConfig.learning_rate,
    final_learning_rate: Annotated[
        float, typer.Option(help="Learning rate of the last step.")
    ] = TuneConfig.final_learning_rate,
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
    save_every: Annotated[
        int, typer.Option(min=1, help="Optimizer steps between checkpoints.")
    ] = TuneConfig.save_every,
    seed: Annotated[int, typer.Option(help="Seed of the order of the windows.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in RUN.")] = False,
) -> None:
    """Tunes a dense or converted causal language model; `mixhead train RUN/recipe.yaml` makes the run again."""
    from mixhead.errors import MixheadError
    from mixhead.report.plots import plot_health
    from mixhead.tasks.registry import train_recipe
    from mixhead.training.recipes import Recipe
    from mixhead.training.run import LOG

    if (teacher is None) != (distillation == 0.0):
        raise MixheadError("Distillation needs both: give --teacher and a --distillation above 0.")
    settings = {
        "model": model,
        "text": text,
        "window": window,
        "teacher": teacher,
        "tokens": tokens,
        "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation,
        "learning_rate": learning_rate,
        "final_learning_rate": min(final_learning_rate, learning_rate),
        "distillation_weight": distillation,
        "lora_rank": lora_rank,
        "balance_coefficient": balance,
        "precision": {None: "auto", True: "bfloat16", False: "float32"}[bf16],
        "gradient_checkpointing": checkpointing,
        "save_every": save_every,
        "seed": seed,
    }
    result = train_recipe(Recipe("tune", "language_modelling", settings), run, resume=resume)
    if not result.metrics:
        return  # one of several processes that torchrun started: the first one reports
    picture = plot_health(run / LOG)
    console.print(
        f"Tuned on {result.metrics['training tokens']:,} tokens in {result.seconds:,.0f} s; last loss "
        f"{result.metrics['last loss (nats)']:.3f} nats. The model is in {result.folder}, the log in {run / LOG}"
        + (f", the health of its routing in {picture}." if picture else ".")
    )
