"""Masked language modelling with a MoA encoder (arXiv 2210.05144): training, perplexity, filling gaps.

As in BERT, 15 % of the tokens are targets: of those 80 % are masked, 10 % replaced by a random token, 10 % left alone.

Shape legend: W windows, B windows of a batch, N tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import torch
from annotated_types import Ge, Gt, Lt
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from mixhead.data.order import SEED_STRIDE, ShuffledRounds
from mixhead.data.text import NAMED, Split, read_text_file, text_source
from mixhead.data.token_batches import RunBatches
from mixhead.data.vocabulary import check_vocabulary, read_vocabulary, vocabulary_for
from mixhead.data.windows import check_text, frame_of, token_windows
from mixhead.errors import MixheadError, first_line
from mixhead.models.context import check_ids, check_length
from mixhead.models.moa import MoAEncoderConfig, MoAForMaskedLM
from mixhead.models.moa.modeling import IGNORED
from mixhead.settings import Count, Source
from mixhead.shards import check_indexes
from mixhead.tasks.moa_training import MoATrainConfig, MoATrainer, model_config
from mixhead.training.run import Metrics

# Names of the files of WikiText-103 in its folder, as published and as Hugging Face writes them.
WIKITEXT_FILES = ("wiki.{part}.tokens", "wiki.{part}.raw")
WIKITEXT_PARTS: dict[Split, str] = {"train": "train", "validation": "valid", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class MaskedLMConfig(MoATrainConfig):
    """How a masked language model is trained; see `MoATrainConfig` for what is not listed here.

    Attributes:
        data: "addresses" (they come with mixhead) or the folder of WikiText-103 (`wiki.train.tokens` ...).
        window: tokens of a window, N.
        batch_size: windows in one forward pass, B.
        mask_share: share of the tokens that are targets.
        test_windows: at most so many windows of the test text, spread evenly; None takes all.
    """

    data: Annotated[str, Source(NAMED)] = "addresses"
    window: Annotated[int, Ge(2)] = 128
    batch_size: Count = 32
    mask_share: Annotated[float, Gt(0), Lt(1)] = 0.15
    test_windows: Count | None = None


@dataclass(frozen=True)
class MaskedPerplexity:
    """How well a model knows the words behind masks.

    Attributes:
        perplexity: exp of the mean cross entropy of the targets, over the tokens of the model's own vocabulary.
        nats: the mean cross entropy.
        targets: how many.
    """

    perplexity: float
    nats: float
    targets: int


class MaskedBatches(RunBatches):
    """A round through the windows, shuffled by seed and masked anew, then the next.

    Args:
        windows_WN: token ids.
        tokenizer: knows the mask and the special tokens.
        batch_size: windows of a batch.
        mask_share: share of the tokens that are targets.
        seed: of order and masks.
    """

    def __init__(
        self, windows_WN: Tensor, tokenizer: PreTrainedTokenizerBase, batch_size: int, mask_share: float, seed: int
    ) -> None:
        self.windows_WN, self.tokenizer, self.batch_size = windows_WN, tokenizer, batch_size
        self.mask_share, self.first_seed = mask_share, seed * SEED_STRIDE
        self.order = ShuffledRounds(len(windows_WN), self.first_seed)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        chosen_B = [self.order[index * self.batch_size + place] for place in range(self.batch_size)]
        generator = torch.Generator().manual_seed(self.first_seed + index)
        ids_BN, labels_BN = mask_tokens(self.windows_WN[chosen_B], self.tokenizer, self.mask_share, generator)
        return {"input_ids": ids_BN, "labels": labels_BN}


def mask_tokens(
    ids_BN: Tensor, tokenizer: PreTrainedTokenizerBase, share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What the model sees, and what it shall find there (-100 where it is not asked), int64 [B, N] each."""
    special = torch.tensor(tokenizer.all_special_ids)
    lot_BN = torch.rand(ids_BN.shape, generator=generator)
    target_BN = (lot_BN < share) & ~torch.isin(ids_BN, special)
    random_BN = torch.randint(len(special), len(tokenizer), ids_BN.shape, generator=generator)
    seen_BN = ids_BN.masked_fill(target_BN & (lot_BN < 0.8 * share), tokenizer.mask_token_id)
    seen_BN = torch.where(target_BN & (lot_BN >= 0.9 * share), random_BN, seen_BN)
    return seen_BN, ids_BN.masked_fill(~target_BN, IGNORED)


class MaskedLMTrainer(MoATrainer):
    """A trainer on masked windows."""

    batches: MaskedBatches


def build(config: MaskedLMConfig, run: Path) -> MaskedLMTrainer:
    """The trainer for a recipe.

    Raises:
        MixheadError: where settings or data cannot be used.
    """
    texts = masked_texts(config.data, "train")
    masked_texts(config.data, "test")
    tokenizer = vocabulary_for(config.vocabulary, texts)
    set_seed(config.seed)
    model = MoAForMaskedLM(model_config(MoAEncoderConfig, config.model, len(tokenizer)))
    windows_WN = token_windows(tokenizer, texts, config.window)
    batches = MaskedBatches(windows_WN, tokenizer, config.batch_size, config.mask_share, config.seed)
    return MaskedLMTrainer(model, config, batches, config.batch_size * config.window, run, tokenizer)


def measure(trainer: MaskedLMTrainer, folder: Path) -> Metrics:
    """The perplexity of the saved model on the test text."""
    config, batches = cast(MaskedLMConfig, trainer.config), trainer.batches
    network, tokenizer = load_masked_lm(folder)
    test = token_windows(tokenizer, masked_texts(config.data, "test"), config.window, config.test_windows)
    result = masked_perplexity(network, tokenizer, test, mask_share=config.mask_share)
    return {
        "training tokens": batches.windows_WN.numel(),
        "rounds": batches.count * config.batch_size / len(batches.windows_WN),
        "parameters": trainer.base_model.num_parameters(),
        "test targets": result.targets,
        "masked perplexity": result.perplexity,
    }


def masked_texts(data: str, split: Split) -> list[str]:
    """The documents of one part of the addresses, or of WikiText-103 in a folder.

    Raises:
        MixheadError: where there is no such text.
    """
    folder = Path(data)
    if not folder.is_dir():
        return text_source(data, split)
    if split not in WIKITEXT_PARTS:
        raise MixheadError(f"{folder} has no part {split}; choose one of {', '.join(WIKITEXT_PARTS)}.")
    for name in WIKITEXT_FILES:
        path = folder / name.format(part=WIKITEXT_PARTS[split])
        if path.is_file():
            return [read_text_file(path)]
    wanted = " or ".join(name.format(part=WIKITEXT_PARTS[split]) for name in WIKITEXT_FILES)
    raise MixheadError(f"The folder {folder} holds no {wanted}.")


def load_masked_lm(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A masked language model and its vocabulary, for evaluation.

    Raises:
        MixheadError: where the folder holds none, or the two do not belong together.
    """
    tokenizer = read_vocabulary(folder)
    if tokenizer.mask_token_id is None:
        raise MixheadError(f"The vocabulary in {folder} has no mask, so its model cannot fill gaps.")
    check_indexes(Path(folder))
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        if type(config) not in AutoModelForMaskedLM._model_mapping:
            name = (config.architectures or [f"a model of type {config.model_type}"])[0]
            raise MixheadError(f"{folder} holds {name}, which fills no gaps: give a masked language model.")
        model = AutoModelForMaskedLM.from_pretrained(str(folder), local_files_only=True)
    except MixheadError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise MixheadError(
            f"The model in {folder} cannot be read as a masked language model ({first_line(error)})."
        ) from error
    check_vocabulary(tokenizer, model)
    return model.eval(), tokenizer


@torch.inference_mode()
def masked_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows_WN: Tensor,
    *,
    mask_share: float = 0.15,
    batch_size: int = 32,
    seed: int = 0,
) -> MaskedPerplexity:
    """Perplexity of the targets; the masks depend on the seed alone, so that models are asked the same."""
    check_ids(model, windows_WN)
    check_length(model, windows_WN.shape[1], "A window")
    total, targets = 0.0, 0
    for number, ids_BN in enumerate(windows_WN.split(batch_size)):
        generator = torch.Generator().manual_seed(seed * SEED_STRIDE + number)
        seen_BN, labels_BN = mask_tokens(ids_BN, tokenizer, mask_share, generator)
        count = int((labels_BN != IGNORED).sum())
        total += float(model(input_ids=seen_BN, labels=labels_BN).loss) * count if count else 0.0
        targets += count
    if targets == 0:
        raise MixheadError("The test text is too short: no token of it was masked.")
    return MaskedPerplexity(math.exp(total / targets), total / targets, targets)


@torch.inference_mode()
def fill_mask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, guesses: int = 5
) -> list[list[tuple[str, float]]]:
    """For every mask in the text the likeliest tokens and their probabilities.

    Raises:
        MixheadError: where the text has no mask, or more tokens than the model has positions.
    """
    mask = tokenizer.mask_token
    check_text(text)
    ids_1N = torch.tensor([ids_with_masks(tokenizer, text)], dtype=torch.int64)
    check_ids(model, ids_1N)
    check_length(model, ids_1N.shape[1])
    places = (ids_1N[0] == tokenizer.mask_token_id).nonzero().flatten().tolist()
    if not places:
        raise MixheadError(f"The text has no gap: write {mask} where a word shall be found.")
    probs_MV = model(input_ids=ids_1N).logits[0, places].float().softmax(-1)
    best = probs_MV.topk(min(guesses, probs_MV.shape[-1]))
    return [
        [(tokenizer.decode([token]), probability) for token, probability in zip(tokens, values, strict=True)]
        for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def ids_with_masks(tokenizer: PreTrainedTokenizerBase, text: str) -> Sequence[int]:
    """Token ids of a text; the space before a mask is part of the word that is sought, so it is left out.

    A tokenizer that begins texts, as BERT's does, ends them too.
    """
    mask = tokenizer.mask_token
    parts = [part.strip() for part in text.split(mask)]
    ids: list[int] = []
    for number, part in enumerate(parts):
        if number:
            ids.append(tokenizer.mask_token_id)
        if part:
            ids += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    begin, end = frame_of(tokenizer)
    return [*begin, *ids, *end] if begin else ids
