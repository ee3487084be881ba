"""Translating lines of text: as a stream, in batches of similar lengths, one line out for each line in."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from mixhead.data.vocabulary import bytes_per_token, check_vocabulary, load_vocabulary
from mixhead.errors import MixheadError, first_line
from mixhead.models.context import check_ids, positions_of
from mixhead.modes import autocast_to
from mixhead.shards import check_indexes
from mixhead.tasks.translation.config import TranslateConfig

logger = logging.getLogger(__name__)

FOREIGN = 1.7  # bytes in a token: below, the vocabulary has hardly seen such text
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
WORTH_A_WARNING = 24  # bytes; shorter lines say nothing of their language


def load_translator(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An encoder-decoder and its vocabulary, for evaluation.

    Raises:
        MixheadError: where the folder holds none, or the two do not belong together.
    """
    tokenizer = load_vocabulary(folder)
    check_indexes(Path(folder))
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        translates = config.is_encoder_decoder
        model = AutoModelForSeq2SeqLM.from_pretrained(str(folder), local_files_only=True) if translates else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise MixheadError(f"The model in {folder} cannot be read ({first_line(error)}).") from error
    if model is None:
        raise MixheadError(f"The model in {folder} ({config.model_type}) cannot translate: it is no encoder-decoder.")
    check_vocabulary(tokenizer, model)
    return model.eval(), tokenizer


def translate_lines(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lines: Iterable[str],
    config: TranslateConfig | None = None,
) -> Iterator[str]:
    """The translation of every line, in order; an empty line stays empty.

    Control characters count as spaces, so that a translation is always one line.

    Args:
        model: an encoder-decoder in evaluation mode.
        tokenizer: of the model.
        lines: without line ends.
        config: see `TranslateConfig`.
    """
    config = TranslateConfig() if config is None else config
    config = replace(config, max_source_tokens=room_for_source(model, config.max_source_tokens))
    stream, number = iter(lines), 1
    while group := list(itertools.islice(stream, config.look_ahead)):
        yield from _translate_group(model, tokenizer, group, number, config)
        number += len(group)


def _translate_group(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lines: Sequence[str],
    first: int,
    config: TranslateConfig,
) -> list[str]:
    pieces: list[str] = []
    owners: list[int] = []
    for index, line in enumerate(lines):
        text = clean(line)
        if len(text.encode()) >= WORTH_A_WARNING and bytes_per_token(tokenizer, text) < FOREIGN:
            logger.warning(
                "Line %d is of a language or script that the vocabulary hardly knows: do not trust its translation.",
                first + index,
            )
        cut = split_long(tokenizer, text, config.max_source_tokens)
        if len(cut) > 1:
            logger.warning(
                "Line %d has more than %d tokens: it is translated in %d pieces.",
                first + index,
                config.max_source_tokens,
                len(cut),
            )
        pieces += cut
        owners += [index] * len(cut)
    parts: list[list[str]] = [[] for _ in lines]
    for owner, text in zip(owners, translate_pieces(model, tokenizer, pieces, config), strict=True):
        parts[owner].append(text)
    return [" ".join(part) for part in parts]


def translate_pieces(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], config: TranslateConfig
) -> list[str]:
    """Translations of texts that are neither empty nor too long, in order."""
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
    results = [""] * len(texts)
    while order:
        longest = len(ids[order[-1]])
        size = max(config.batch_tokens // longest, 1)
        batch, order = order[-size:], order[:-size]
        for index, text in zip(batch, _generate(model, tokenizer, [ids[i] for i in batch], config), strict=True):
            results[index] = clean(text)
    return results


@torch.inference_mode()
def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[list[int]], config: TranslateConfig
) -> list[str]:
    inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
    longest = inputs["input_ids"].shape[1]
    check_ids(model, inputs["input_ids"])
    with autocast_to(config.dtype, model.device):
        outputs = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            num_beams=config.beams,
            length_penalty=config.length_penalty,
            early_stopping=config.beams > 1,
            do_sample=False,
            max_new_tokens=most_new_tokens(model, longest),
        )
    return tokenizer.batch_decode(outputs, skip_special_tokens=True)


def clean(text: str) -> str:
    """The text on one line: control characters, lone surrogates and runs of white space become single spaces.

    All other characters stay, also those that this Python knows nothing of: joiners inside words and emoji, characters
    for private use, emoji newer than its tables.
    """
    return " ".join(CONTROL.sub(" ", text).split())


def room_for_source(model: PreTrainedModel, most: int) -> int:
    """Source tokens of a piece: so many, or as many as the model has positions."""
    count = positions_of(model).count
    return most if count is None else min(most, count)


def most_new_tokens(model: PreTrainedModel, source_tokens: int) -> int:
    """How long a translation may become: far longer than any should, and never longer than the model has positions."""
    count, most = positions_of(model).count, 2 * source_tokens + 16
    return most if count is None else max(1, min(most, count - 1))


def split_long(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> list[str]:
    """Pieces of at most that many tokens, cut at spaces; one word that is longer is cut inside. Nothing is dropped."""
    if len(text.encode()) < max_tokens or _count(tokenizer, text) <= max_tokens:
        return [text] if text else []
    pieces: list[str] = []
    words: list[str] = []
    length = 1  # the end token
    for word in text.split():
        count = _count(tokenizer, word) - 1
        if words and length + count > max_tokens:
            pieces.append(" ".join(words))
            words, length = [], 1
        if count >= max_tokens:
            *cuts, word = cut_word(word, max_tokens)
            pieces += cuts
            count = _count(tokenizer, word) - 1
        words.append(word)
        length += count
    return [*pieces, " ".join(words)]


def cut_word(word: str, max_tokens: int) -> list[str]:
    """Parts of a word that have at most that many tokens, whatever the vocabulary: a byte is at most one token."""
    room = max(max_tokens - 2, 1)  # beside the end token and the space before the word
    parts, size = [""], 0
    for character in word:
        size += len(character.encode())
        if size > room and parts[-1]:
            parts.append("")
            size = len(character.encode())
        parts[-1] += character
    return parts


def _count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, verbose=False)["input_ids"])
