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
from typing import Annotated, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from mixhead.data.aligned_pages import SentencePair
from mixhead.data.sentence_pairs import NAMED, read_pairs
from mixhead.data.token_batches import PairBatches
from mixhead.data.vocabulary import vocabulary_for
from mixhead.models.moa import MoATransformerConfig, MoATransformerForConditionalGeneration
from mixhead.settings import Count, Share, Source
from mixhead.tasks.moa_training import MoATrainConfig, MoATrainer, model_config
from mixhead.tasks.translation.config import TranslateConfig
from mixhead.tasks.translation.scores import TranslationScores, require_sacrebleu, score_translations
from mixhead.tasks.translation.translate import load_translator, translate_lines
from mixhead.training.run import Metrics


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

    data: Annotated[str, Source(NAMED)]
    tests: Annotated[Mapping[str, str], Source(NAMED)] = field(default_factory=dict)
    test_sentences: Count | None = None
    languages: tuple[str, str] = ("en", "de")
    max_tokens: Count = 8192
    max_length: Count = 256
    label_smoothing: Share = 0.1
    beams: Count = 4
    length_penalty: float = 0.6


class TranslationTrainer(MoATrainer):
    """Knows what its model will be tested on, by name."""

    tests: Mapping[str, Sequence[SentencePair]]
    batches: PairBatches


def build(config: TranslationConfig, run: Path) -> TranslationTrainer:
    """The trainer for a recipe.

    Raises:
        MixheadError: where settings or data cannot be used.
    """
    if config.tests:
        require_sacrebleu()
    tests = {name: read_pairs(source, "test", config.languages) for name, source in config.tests.items()}
    pairs = read_pairs(config.data, "train", config.languages)
    tokenizer = vocabulary_for(config.vocabulary, (side for pair in pairs for side in pair))
    set_seed(config.seed)
    sizes = model_config(MoATransformerConfig, config.model, len(tokenizer))
    model = MoATransformerForConditionalGeneration(sizes)
    batches = PairBatches(tokenizer, pairs, config.max_tokens, config.max_length, config.seed)
    tokens = sum(batches.targets.length(i) for i in batches.lengths) / batches.batches_per_round
    smoothing = {"label_smoothing": config.label_smoothing}
    trainer = TranslationTrainer(model, config, batches, tokens, run, tokenizer, **smoothing)
    trainer.tests = {name: spread(test, config.test_sentences) for name, test in tests.items()}
    return trainer


def measure(trainer: TranslationTrainer, folder: Path) -> Metrics:
    """The scores of the saved model on every test."""
    batches = trainer.batches
    metrics: dict[str, float | int | str] = {
        "training pairs": len(batches.lengths),
        "rounds": batches.count / batches.batches_per_round,
        "parameters": trainer.base_model.num_parameters(),
    }
    network, tokenizer = load_translator(folder)
    for name, test in trainer.tests.items():
        metrics |= tested(network, tokenizer, name, test, trainer)
    return metrics


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
    trainer: TranslationTrainer,
) -> dict[str, float | int | str]:
    """The scores on one test as metrics."""
    config = cast(TranslationConfig, trainer.config)
    dtype = torch.bfloat16 if trainer.bfloat16 else None
    how = TranslateConfig(beams=config.beams, length_penalty=config.length_penalty, dtype=dtype)
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
    require_sacrebleu()
    start = time.process_time()
    translations = list(translate_lines(model, tokenizer, [pair.source for pair in pairs], config))
    seconds = time.process_time() - start
    return score_translations(translations, [pair.target for pair in pairs]), seconds
