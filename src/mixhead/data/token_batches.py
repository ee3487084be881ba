"""Batches of sentence pairs with about equally many tokens, in an order that depends on the seed alone.

Shape legend: B sentences of a batch, T source tokens, N target tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mixhead.data.aligned_pages import SentencePair
from mixhead.data.order import SEED_STRIDE
from mixhead.errors import MixheadError
from mixhead.models.moa.modeling import IGNORED


class Sentences:
    """Token ids of many sentences in one tensor, which needs far less memory than lists.

    Args:
        tokenizer: adds the end token.
        texts: the sentences.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self.starts, parts = [0], []
        for begin in range(0, len(texts), 10_000):
            for ids in tokenizer(list(texts[begin : begin + 10_000]), verbose=False)["input_ids"]:
                parts.append(torch.tensor(ids, dtype=torch.int32))
                self.starts.append(self.starts[-1] + len(ids))
        self.ids = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Tensor:
        return self.ids[self.starts[index] : self.starts[index + 1]].long()

    def length(self, index: int) -> int:
        """How many tokens a sentence has."""
        return self.starts[index + 1] - self.starts[index]

    def padded(self, indices: Sequence[int], filler: int) -> Tensor:
        """Some sentences as one tensor, filled up on the right, int64 [B, T]."""
        return torch.nn.utils.rnn.pad_sequence([self[i] for i in indices], batch_first=True, padding_value=filler)


class RunBatches(Dataset[dict[str, Tensor]]):
    """The batches of a whole run, in order: item i is the i-th, whatever happened before.

    Attributes:
        count: how many the run reads.
    """

    count = 0

    def of_length(self, count: int) -> Self:
        """These batches, of which the run reads so many."""
        self.count = count
        return self

    def __len__(self) -> int:
        return self.count


class PairBatches(RunBatches):
    """A round through the pairs, shuffled by seed, then the next.

    Args:
        tokenizer: of both languages.
        pairs: to learn from.
        max_tokens: of a batch, padding included, on its longer side.
        max_length: pairs with more tokens on either side are left out.
        seed: of the order.

    Raises:
        MixheadError: where no pair is short enough.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[SentencePair],
        max_tokens: int,
        max_length: int,
        seed: int,
    ) -> None:
        self.sources = Sentences(tokenizer, [pair.source for pair in pairs])
        self.targets = Sentences(tokenizer, [pair.target for pair in pairs])
        self.pad, self.max_tokens, self.seed = tokenizer.pad_token_id, max_tokens, seed
        lengths = [max(self.sources.length(i), self.targets.length(i)) for i in range(len(pairs))]
        self.lengths = {i: length for i, length in enumerate(lengths) if length <= min(max_length, max_tokens)}
        if not self.lengths:
            raise MixheadError(f"No sentence pair has at most {min(max_length, max_tokens)} tokens on either side.")
        self._round, self._plan = -1, list[list[int]]()
        self.batches_per_round = len(self._batches(0))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number, place = divmod(index, self.batches_per_round)
        if number != self._round:
            self._round, self._plan = number, self._batches(number)
        return self.batch(self._plan[place])

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """These pairs as arguments of the model."""
        input_ids = self.sources.padded(indices, self.pad)
        lengths_B = torch.tensor([self.sources.length(i) for i in indices])
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths_B.unsqueeze(1)).long(),
            "labels": self.targets.padded(indices, IGNORED),
        }

    def _batches(self, number: int) -> list[list[int]]:
        """The batches of one round. The pairs of a batch have similar lengths, and which ones differs by round.

        The number of batches must not: so lengths alone say where to cut, and equal lengths are shuffled.
        """
        generator = torch.Generator().manual_seed(self.seed * SEED_STRIDE + number)
        kept = list(self.lengths)
        shuffled = [kept[i] for i in torch.randperm(len(kept), generator=generator).tolist()]
        batches: list[list[int]] = [[]]
        for index in sorted(shuffled, key=self.lengths.__getitem__):
            # Sorted, so that this pair is the longest of its batch so far.
            if (len(batches[-1]) + 1) * self.lengths[index] > self.max_tokens:
                batches.append([])
            batches[-1].append(index)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
