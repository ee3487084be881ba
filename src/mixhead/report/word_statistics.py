"""Which words an expert is chosen for: pointwise mutual information, as in the MoA paper (arXiv 2210.05144).

Shape legend: T tokens, H heads (or experts), W words, X the best of them or blocks of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.report.statistics import Bools, Floats, Ints, correlation, false_discovery, load_of


@dataclass(frozen=True)
class WordScore:
    """A word that goes with an expert.

    Attributes:
        word: the word.
        pmi: log2(p(word, expert) / (p(word) p(expert))): how many times, in powers of 2, more often than by chance.
        count: how often the expert was chosen for it.
    """

    word: str
    pmi: float
    count: int


def expert_words(
    selected_TH: Tensor,
    words: Sequence[str],
    *,
    top: int = 5,
    min_count: int = 5,
    block_T: Ints | None = None,
) -> list[list[WordScore]]:
    """For every expert the words with the highest pointwise mutual information.

    Args:
        selected_TH: bool, whether the token used the expert.
        words: the word of every token.
        top: how many words of each expert.
        min_count: rarer words are left out: by chance they would stand on top.
        block_T: the block of alike tokens that each token belongs to (`report.statistics.blocks_of`). Where it is
            given, words are left out whose use of the expert may be chance: of those listed at most 5% are.

    Returns:
        One list for each expert, the highest first, of equal ones the more frequent; empty where it was never chosen
        for a frequent word.

    Raises:
        MixheadError: where there is not one word for every token.
    """
    if len(words) != selected_TH.shape[0]:
        raise MixheadError(f"There are {len(words)} words for {selected_TH.shape[0]} tokens: give one for each.")
    known = sorted(set(words))
    number = {word: index for index, word in enumerate(known)}
    word_T = torch.tensor([number[word] for word in words], dtype=torch.int64)
    together_WH = torch.zeros(len(known), selected_TH.shape[1], dtype=torch.float64)
    together_WH.index_add_(0, word_T, selected_TH.to(torch.float64))
    total = together_WH.sum().clamp(min=1.0)
    frequent_W = torch.bincount(word_T, minlength=len(known)) >= min_count
    expected_WH = together_WH.sum(1, keepdim=True) * together_WH.sum(0, keepdim=True) / total
    pmi_WH = (together_WH / expected_WH.clamp(min=1e-300)).log2()
    pmi_WH = pmi_WH.masked_fill(~frequent_W.unsqueeze(1) | (together_WH == 0), -torch.inf)
    if block_T is not None:
        sure_WH = sure_words(selected_TH.numpy(), word_T.numpy(), block_T, frequent_W.numpy())
        pmi_WH = pmi_WH.masked_fill(~torch.from_numpy(sure_WH), -torch.inf)
    # Every word that only ever uses the expert has the same score: the frequent ones say more.
    best_XH = (pmi_WH + 1e-9 * together_WH).topk(min(top, len(known)), dim=0).indices
    return [
        [
            WordScore(known[word], float(pmi_WH[word, head]), int(together_WH[word, head]))
            for word in best_XH[:, head].tolist()
            if pmi_WH[word, head] > -torch.inf
        ]
        for head in range(selected_TH.shape[1])
    ]


def sure_words(selected_TH: Bools, word_T: Ints, block_T: Ints, frequent_W: Bools) -> Bools:
    """Which frequent words use an expert more often than by chance, with at most 5% false discoveries: bool [W, H]."""
    sure_WH = np.zeros((len(frequent_W), selected_TH.shape[1]), dtype=bool)
    chance_WH = chance_of(selected_TH, word_T, block_T)[frequent_W]
    sure_WH[frequent_W] = false_discovery(chance_WH.ravel()).reshape(chance_WH.shape) < 0.05
    return sure_WH


def chance_of(selected_TH: Bools, word_T: Ints, block_T: Ints) -> Floats:
    """An upper bound of the probability that a word uses an expert at least so often by chance, [W, H].

    Chernoff's bound of the binomial distribution, for as many independent tokens as those of the word are worth: tokens
    of one block are alike.
    """
    load = load_of(selected_TH, block_T)
    count_W1 = np.bincount(word_T)[:, None]
    in_block = np.unique(np.stack([word_T, block_T]), axis=1, return_counts=True)
    pairs_W1 = np.bincount(in_block[0][0], in_block[1] * (in_block[1] - 1))[:, None]
    used_WH = np.zeros((len(count_W1), selected_TH.shape[1]))
    np.add.at(used_WH, word_T, selected_TH)
    share_WH = used_WH / count_W1
    worth_WH = count_W1 / (1 + np.nan_to_num(correlation(load), nan=1.0) * pairs_W1 / count_W1)
    with np.errstate(divide="ignore", invalid="ignore"):
        surplus_WH = np.where(share_WH > 0, share_WH * np.log(share_WH / load.share_H), 0.0)
        surplus_WH += np.where(share_WH < 1, (1 - share_WH) * np.log((1 - share_WH) / (1 - load.share_H)), 0.0)
    return np.where(share_WH > load.share_H, np.exp(-worth_WH * np.nan_to_num(surplus_WH)), 1.0)


def words_table(words: dict[str, list[list[WordScore]]], load: dict[str, Tensor]) -> str:
    """A Markdown table: a line for each expert of each module, its load and its words.

    Args:
        words: by module, what `expert_words` returned.
        load: by module, the share of the tokens that used each expert, [H].
    """
    lines = [
        "| module | expert | load | words (times as often as by chance: 2 to the pointwise mutual information) |",
        "|---|---:|---:|---|",
    ]
    for module, experts in words.items():
        for expert, scores in enumerate(experts):
            listed = ", ".join(f"{_plain(score.word)} ({2**score.pmi:.1f})" for score in scores)
            lines.append(f"| {module} | {expert} | {float(load[module][expert]):.1%} | {listed} |")
    return "\n".join(lines)


def _plain(word: str) -> str:
    """A word that cannot break a table of Markdown or HTML."""
    return word.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("`", "&#96;")
