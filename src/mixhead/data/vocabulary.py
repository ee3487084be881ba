"""A vocabulary of subwords, trained on texts: byte-level BPE, so that every text can be written and read back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mixhead.data.records import RECORDS
from mixhead.data.text import text_source
from mixhead.errors import MixheadError, first_line
from mixhead.models.moa import MoAConfig

SPECIAL = ("<pad>", "<s>", "</s>", "<mask>")  # in this order: ids 0 to 3
SMALLEST = len(SPECIAL) + 256  # every byte is a token


def vocabulary_for(wanted: int | str, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The vocabulary in a folder, or a new one of that size, trained on the texts."""
    return load_vocabulary(wanted) if isinstance(wanted, str) else train_vocabulary(texts, wanted)


def train_vocabulary(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of that many tokens; sentences end in `</s>`.

    Args:
        texts: what it shall write in few tokens, for translation in both languages.
        size: of the vocabulary.

    Raises:
        MixheadError: where the size is too small for all bytes, or there is no text.
    """
    if size < SMALLEST:
        raise MixheadError(f"A vocabulary of {size} tokens is too small: every byte is one, so {SMALLEST} at least.")
    texts = iter(texts)
    first = next(texts, None)
    if first is None:
        raise MixheadError("There is no text to train a vocabulary on.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain([first], texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    pad, begin, end, mask = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=begin,
        eos_token=end,
        mask_token=mask,
        clean_up_tokenization_spaces=False,
    )


def load_vocabulary(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, for sentences that end.

    Raises:
        MixheadError: where there is none, or it lacks padding or an end token.
    """
    tokenizer = read_vocabulary(folder)
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise MixheadError(f"The vocabulary in {folder} has no padding token or no end token.")
    return tokenizer


def read_vocabulary(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; raises where there is none."""
    if not Path(folder).is_dir():
        raise MixheadError(
            f"There is no folder {folder}: give that of a trained model, or of a vocabulary (`mixhead vocabulary`)."
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MixheadError(f"The vocabulary in {folder} cannot be read ({first_line(error)}).") from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raises where a tokenizer belongs to another model."""
    config = model.config
    # Models of others may have room for more tokens; those of mixhead are made for just their vocabulary.
    exact = isinstance(config, MoAConfig)
    if len(tokenizer) > config.vocab_size or (exact and len(tokenizer) < config.vocab_size):
        raise MixheadError(
            f"The vocabulary has {len(tokenizer)} tokens, but the model knows {config.vocab_size}: they do not belong "
            "together."
        )
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name) != getattr(config, name):
            raise MixheadError(
                f"{name} is {getattr(tokenizer, name)} in the vocabulary, but {getattr(config, name)} in the model: "
                "they do not belong together."
            )


def bytes_per_token(tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """How much of a text a token holds, on average; near 1 where the vocabulary never saw its language."""
    tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return len(text.encode()) / max(tokens, 1)


def lines_to_learn(path: Path) -> Iterator[str]:
    """The lines of a text file; of a file of records those of their field `text`, see `text_source`."""
    if path.suffix.lower() not in RECORDS:
        return lines_of([path])
    return (line for document in text_source(path) for line in document.splitlines())


def lines_of(paths: Iterable[Path]) -> Iterator[str]:
    """The lines of text files, without their ends.

    Raises:
        MixheadError: where a file is missing or no UTF-8 text.
    """
    for path in paths:
        try:
            with path.open(encoding="utf-8", newline="\n") as file:
                for line in file:
                    yield line.rstrip("\r\n")
        except FileNotFoundError:
            raise MixheadError(f"There is no text file {path}; check the name.") from None
        except UnicodeDecodeError as error:
            raise MixheadError(f"{path} is not UTF-8 text (byte {error.start:,} cannot be decoded).") from None
