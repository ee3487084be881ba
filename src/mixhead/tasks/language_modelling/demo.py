"""The demonstration: a real model converted, tuned briefly, compared and asked to write, in minutes on two cores."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixhead import store
from mixhead.convert import CalibrationConfig, MoHConfig, calibrate, convert
from mixhead.data.text import text_source
from mixhead.data.windows import prompt_ids, token_windows
from mixhead.precision import autocast_dtype
from mixhead.recording import keep_routing
from mixhead.tasks.language_modelling.comparison_table import Comparison, Row
from mixhead.tasks.language_modelling.config import WINDOW
from mixhead.tasks.language_modelling.demo_config import DemoConfig
from mixhead.tasks.language_modelling.evaluate import heads_of, perplexity
from mixhead.tasks.language_modelling.lm_eval_tasks import evaluate_tasks, write_tasks
from mixhead.tasks.language_modelling.train import TuneConfig, tune

PROMPT = "My fellow Americans, the state of the Union is"

OnProgress = Callable[[int, int], None]
Bar = Callable[[str], AbstractContextManager[OnProgress]]


@dataclass(frozen=True)
class DemoResult:
    """What came out.

    Attributes:
        table: the four rows.
        samples: what the original and the converted model wrote, by name.
        load: share of the tokens that used each head, float32 [layers, heads]; 1 in layers that use all of theirs.
        seconds: wall time.
        model_folder: the tuned converted model.
    """

    table: Comparison
    samples: dict[str, str]
    load: Tensor
    seconds: float
    model_folder: Path


@dataclass(frozen=True)
class Demo:
    """One run of the demonstration.

    Attributes:
        original: folder of the dense model.
        out: folder to write to.
        config: how much is done.
        bar: makes a progress bar from a title.
        say: receives what is being done, in words.
    """

    original: Path
    out: Path
    config: DemoConfig
    bar: Bar
    say: Callable[[str], None]

    def run(self) -> DemoResult:
        """Everything, in the order of the table."""
        start = time.perf_counter()
        tokenizer = store.load_tokenizer(self.original)
        with self.bar("Reading the addresses") as on_progress:
            train_WT = token_windows(tokenizer, text_source("addresses", "train")[-24:], WINDOW, None, on_progress)
        test_WT = self.windows(tokenizer, "test", self.config.test_windows)
        dense = self.load()
        rows = [self.row("original", dense, tokenizer, test_WT, 0, 0.0, original=True)]
        samples = {"original": self.write(dense, tokenizer, "Original writes")}
        seconds = self.tune(dense, train_WT, "original")
        rows.append(self.row("original, tuned", dense, tokenizer, test_WT, self.tokens, seconds, original=True))
        published = convert(
            self.load(), MoHConfig(active_heads=self.config.active_heads, shared_heads=4, router="query_norm")
        )
        seconds = self.tune(published, train_WT, "published recipe")
        rows.append(self.row("published recipe, tuned", published, tokenizer, test_WT, self.tokens, seconds))
        ours, seconds = self.convert(tokenizer)
        seconds += self.tune(ours, train_WT, "mixhead")
        rows.append(self.row("mixhead, calibrated and tuned", ours, tokenizer, test_WT, self.tokens, seconds))
        samples["mixhead"] = self.write(ours, tokenizer, "Mixhead writes")
        folder = self.out / "model"
        store.save(ours, tokenizer, folder, overwrite=True)
        notes = (
            f"SmolLM2-135M-Instruct on State of the Union addresses; {self.config.test_windows} held-out windows of "
            f"{WINDOW} tokens, {self.config.questions} questions of each task; one seed.",
            "published recipe: the first 4 heads shared, the others chosen by the norm of their query.",
        )
        table = Comparison("SmolLM2-135M as mixture-of-head", tuple(rows), notes)
        return DemoResult(table, samples, self.load_of_heads(ours, test_WT[:4]), time.perf_counter() - start, folder)

    @property
    def tokens(self) -> int:
        """Tokens that tuning really reads: whole steps."""
        return self.config.tuning_tokens // (4 * WINDOW) * 4 * WINDOW

    def load(self) -> PreTrainedModel:
        """A fresh copy of the original."""
        return store.load_causal_lm(self.original)[0]

    def windows(self, tokenizer: PreTrainedTokenizerBase, split: Any, count: int) -> Tensor:
        """Token windows of a part of the addresses."""
        return token_windows(tokenizer, text_source("addresses", split), WINDOW, count)

    def convert(self, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, float]:
        """Our converted and calibrated model, and the seconds that took."""
        start = time.perf_counter()
        model = convert(self.load(), MoHConfig(active_heads=self.config.active_heads, shared_heads=0))
        batches = self.windows(tokenizer, "calibration", self.config.calibration_tokens // WINDOW).split(4)
        with self.bar("Calibrating") as on_progress:
            calibrate(model, batches, CalibrationConfig(autocast=autocast_dtype()), on_progress)
        return model, time.perf_counter() - start

    def tune(self, model: PreTrainedModel, windows_WT: Tensor, name: str) -> float:
        """Tunes in place, anew at every run of the demonstration; returns the seconds."""
        self.say(f"Tuning: {name}")
        run = self.out / "runs" / name.replace(" ", "-")
        config = TuneConfig(tokens=self.tokens, save_every=1_000_000)
        return tune(model, windows_WT, config, fresh(run)).seconds

    def row(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        test_WT: Tensor,
        tokens: int,
        seconds: float,
        original: bool = False,
    ) -> Row:
        """Measures one model."""
        start = time.perf_counter()
        with self.bar(f"Perplexity: {name}") as on_progress:
            measured = perplexity(model, test_WT, autocast=autocast_dtype(), on_progress=on_progress)
        write_tasks(self.out / "tasks", items=self.config.questions)
        with self.bar(f"Questions: {name}") as on_progress:
            folder = self.out / "tasks"
            scores = evaluate_tasks(model, tokenizer, folder, autocast=autocast_dtype(), on_progress=on_progress)
        active, heads = heads_of(model)
        seconds += time.perf_counter() - start
        return Row(name, active, heads, tokens, measured, scores.cloze, scores.choice, seconds, original)

    def write(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, title: str) -> str:
        """A paragraph, always the likeliest token with a mild penalty on repetition."""
        inputs, _ = prompt_ids(model, tokenizer, PROMPT, self.config.new_tokens, self.config.new_tokens)
        with self.bar(title) as on_progress, torch.inference_mode():
            counter = Counter(on_progress, self.config.new_tokens)
            ids = model.generate(
                **inputs,
                max_new_tokens=self.config.new_tokens,
                do_sample=False,
                repetition_penalty=1.1,
                stopping_criteria=[counter],
            )
        return str(tokenizer.decode(ids[0], skip_special_tokens=True))

    def load_of_heads(self, model: PreTrainedModel, windows_WT: Tensor) -> Tensor:
        """Share of the tokens that used each head of each layer."""
        with keep_routing(model) as log, torch.inference_mode():
            model.eval()(input_ids=windows_WT)
        loads = log.load()
        heads = model.config.num_attention_heads
        names = [f"model.layers.{layer}.self_attn" for layer in range(model.config.num_hidden_layers)]
        return torch.stack([loads.get(name, torch.ones(heads)) for name in names])


class Counter:
    """Counts generated tokens for a progress bar; never asks to stop."""

    def __init__(self, on_progress: OnProgress, total: int) -> None:
        self.on_progress, self.total, self.done = on_progress, total, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        del scores, kwargs
        self.done += 1
        self.on_progress(self.done, self.total)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def fresh(run: Path) -> Path:
    """The folder without what an earlier demonstration left there."""
    shutil.rmtree(run, ignore_errors=True)
    return run
