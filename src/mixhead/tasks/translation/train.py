"""Translation with MoA (arXiv 2210.05144): a vocabulary, an encoder-decoder, and its scores on texts it never saw.

The defaults of training are the published recipe: Adam with an inverse-square-root schedule, label smoothing, batches
of equally many tokens, the mean of the last checkpoints, beam search with 4 beams and a length penalty of 0.6. Several
processes: start `mixhead` with `torchrun`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from mixhead.data.aligned_pages import SentencePair
from mixhead.data.sentence_pairs import read_pairs
from mixhead.data.token_batches import PairBatches
from mixhead.data.vocabulary import vocabulary_for
from mixhead.errors import MixheadError
from mixhead.models.moa import MoATransformerConfig, MoATransformerForConditionalGeneration
from mixhead.tasks.moa_training import MoATrainConfig, MoATrainer, model_config
from mixhead.tasks.translation.config import TranslateConfig
from mixhead.tasks.translation.scores import TranslationScores, score_translations
from mixhead.tasks.translation.translate import load_translator, translate_lines
from mixhead.training.recipes import Recipe, settings_from
from mixhead.training.run import open_run, run_training
from mixhead.training.trainer import TrainingResult


@dataclass(frozen=True, kw_only=True)
class TranslationConfig(MoATrainConfig):
    """How an encoder-decoder is trained; see `MoATrainConfig` for what is not listed here.

    Attributes:
        data: sentence pairs to learn from, see `read_pairs`.
        tests: sentence pairs to score the model on, by name.
        test_sentences: at most so many of each, spread evenly; None takes all.
        languages: to translate from and into.
        max_tokens: of a batch, on its longer side, padding included.
        max_length: pairs with more tokens on either side are left out of training.
        label_smoothing: share of the target probability that is spread over the vocabulary.
        beams: of beam search in the test.
        length_penalty: of beam search in the test.
    """

    data: str
    tests: Mapping[str, str] = field(default_factory=dict)
    test_sentences: int | None = None
    languages: tuple[str, str] = ("en", "de")
    max_tokens: int = 8192
    max_length: int = 256
    label_smoothing: float = 0.1
    beams: int = 4
    length_penalty: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_tokens", "max_length", "beams"):
            if getattr(self, name) < 1:
                raise MixheadError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.test_sentences is not None and self.test_sentences < 1:
            raise MixheadError(f"test_sentences={self.test_sentences} must be at least 1, or null for all.")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise MixheadError(f"label_smoothing={self.label_smoothing} must be at least 0 and below 1.")


def train(recipe: Recipe, run: Path, *, resume: bool = False) -> TrainingResult:
    """Trains what the recipe says and scores it on the tests.

    Args:
        recipe: with the settings of `TranslationConfig`.
        run: folder of the run.
        resume: continues the run in that folder.

    Raises:
        MixheadError: where settings or data cannot be used, the loss becomes NaN, or the disk is full.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint.
    """
    config = settings_from(TranslationConfig, recipe.values)
    tests = {name: read_pairs(source, "test", config.languages) for name, source in config.tests.items()}
    pairs = read_pairs(config.data, "train", config.languages)
    tokenizer = vocabulary_for(config.vocabulary, (side for pair in pairs for side in pair))
    set_seed(config.seed)
    sizes = model_config(MoATransformerConfig, config.model, len(tokenizer))
    model = MoATransformerForConditionalGeneration(sizes)
    batches = PairBatches(tokenizer, pairs, config.max_tokens, config.max_length, config.seed)
    tokens = sum(batches.targets.length(i) for i in batches.lengths) / batches.batches_per_round
    trainer = MoATrainer(model, config, batches, tokens, run, label_smoothing=config.label_smoothing)
    done = open_run(trainer, "recipe.json", {"recipe": recipe.name, "task": recipe.task, **recipe.values}, resume)
    seconds = run_training(trainer, done)
    folder = trainer.save_averaged(tokenizer)
    metrics: dict[str, float | int | str] = {
        "training pairs": len(batches.lengths),
        "rounds": batches.count / batches.batches_per_round,
        "parameters": model.num_parameters(),
        "training seconds": round(seconds, 1),
    }
    if trainer.accelerator.is_main_process:
        network, tokenizer = load_translator(folder)
        for name, test in tests.items():
            some = spread(test, config.test_sentences)
            metrics |= tested(network, tokenizer, name, some, config, trainer.bf16_autocast)
    trainer.accelerator.wait_for_everyone()
    return TrainingResult(folder, metrics)


def spread(pairs: Sequence[SentencePair], limit: int | None) -> list[SentencePair]:
    """At most so many of the pairs, spread evenly over all of them."""
    if limit is None or limit >= len(pairs):
        return list(pairs)
    return [pairs[i * len(pairs) // limit] for i in range(limit)]


def tested(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    pairs: Sequence[SentencePair],
    config: TranslationConfig,
    bf16: bool,
) -> dict[str, float | int | str]:
    """The scores on one test as metrics."""
    how = TranslateConfig(
        beams=config.beams,
        length_penalty=config.length_penalty,
        dtype=torch.bfloat16 if bf16 else None,
    )
    scores, seconds = evaluate_translation(model, tokenizer, pairs, how)
    return {
        f"{name}: sentences": scores.sentences,
        f"{name}: sacreBLEU": scores.bleu,
        f"{name}: chrF": scores.chrf,
        f"{name}: compound-split BLEU": scores.compound_split_bleu,
        f"{name}: CPU seconds": round(seconds, 3),
        "sacreBLEU signature": scores.bleu_signature,
        "chrF signature": scores.chrf_signature,
    }


def evaluate_translation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[SentencePair],
    config: TranslateConfig | None = None,
) -> tuple[TranslationScores, float]:
    """Translates the sources and scores the result: the scores, and the CPU seconds of all threads that it took."""
    start = time.process_time()
    translations = list(translate_lines(model, tokenizer, [pair.source for pair in pairs], config))
    seconds = time.process_time() - start
    return score_translations(translations, [pair.target for pair in pairs]), seconds
