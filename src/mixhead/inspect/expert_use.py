"""Which attention experts a MoA model uses for which words.

Shape legend: B sentences, N tokens, T tokens of all sentences without padding, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixhead.data.aligned_pages import SentencePair
from mixhead.errors import MixheadError
from mixhead.models.context import check_ids
from mixhead.models.moa.attention import ExpertAttention
from mixhead.models.moa.modeling import IGNORED


@dataclass(frozen=True)
class ExpertUse:
    """What one attention module chose.

    Attributes:
        selected_TE: bool, whether the token used the expert.
        words: of every token, the word that it is in.
        sentence_T: of every token, the number of its sentence: tokens of one are alike.
    """

    selected_TE: Tensor
    words: list[str]
    sentence_T: NDArray[np.int64]

    @property
    def load_E(self) -> Tensor:
        """Share of the tokens that used each expert, float32 [E]."""
        return self.selected_TE.float().mean(0)


@torch.inference_mode()
def expert_use(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[SentencePair], batch_size: int = 32
) -> dict[str, ExpertUse]:
    """What every attention module of an encoder-decoder chose for source and target words.

    The decoder sees the reference translations, one word behind the place where each is predicted.

    Args:
        model: with attention experts, in evaluation mode.
        tokenizer: of the model.
        pairs: sentences and their translations.
        batch_size: pairs in one forward pass.

    Raises:
        MixheadError: where the model has no experts.
    """
    names = [name.removeprefix("model.") for name, m in model.named_modules() if isinstance(m, ExpertAttention)]
    if not names:
        raise MixheadError("The model has no attention experts: its attention is dense.")
    selected: dict[str, list[Tensor]] = {name: [] for name in names}
    words: dict[str, list[str]] = {name: [] for name in names}
    lengths: dict[str, list[int]] = {name: [] for name in names}
    for begin in range(0, len(pairs), batch_size):
        batch = pairs[begin : begin + batch_size]
        sources, source_words = with_words(tokenizer, [pair.source for pair in batch])
        targets, target_words = with_words(tokenizer, [pair.target for pair in batch])
        # The decoder is one word behind: it sees the start token, and never the last one.
        behind = [["<s>", *sentence[:-1]] for sentence in target_words]
        labels_BN = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, IGNORED)
        check_ids(model, sources["input_ids"])
        check_ids(model, targets["input_ids"])
        output = model(**sources, labels=labels_BN, output_routing=True)
        for name, routing in zip(names, output.routing, strict=True):
            encoder = name.startswith("encoder")
            mask_BN = (sources if encoder else targets)["attention_mask"].bool()
            selected[name].append(routing.selected_BNH[mask_BN])
            sentences = source_words if encoder else behind
            words[name] += [word for sentence in sentences for word in sentence]
            lengths[name] += [len(sentence) for sentence in sentences]
    return {
        name: ExpertUse(torch.cat(selected[name]), words[name], np.repeat(np.arange(len(pairs)), lengths[name]))
        for name in names
    }


def with_words(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Padded token ids with their mask, and for every token that is no padding the word that it is in."""
    encoded = tokenizer(list(texts), padding=True, return_tensors="pt", verbose=False)
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    words = []
    for row in range(len(texts)):
        tokens = ids[row][mask[row].bool()].tolist()
        places = encoded.word_ids(row)[: len(tokens)]
        parts: dict[int | None, list[int]] = {}
        for token, place in zip(tokens, places, strict=True):
            parts.setdefault(place, []).append(token)
        text = {place: tokenizer.decode(ids).strip() for place, ids in parts.items()}
        words.append([text[place] for place in places])
    return {"input_ids": ids, "attention_mask": mask}, words
