"""Which words go with which expert."""

import math

import numpy as np
import pytest
import torch

from mixhead.errors import MixheadError
from mixhead.report.word_statistics import expert_words, words_table


def test_words_of_an_expert_are_those_it_gets_more_often_than_by_chance() -> None:
    words = ["Berlin"] * 10 + ["the"] * 30 + ["rare"]
    selected_TH = torch.zeros(41, 2, dtype=torch.bool)
    selected_TH[:10, 0] = True
    selected_TH[10:40] = torch.tensor([[True, False], [False, True], [False, True]]).repeat(10, 1)
    selected_TH[40, 1] = True
    first, second = expert_words(selected_TH, words, min_count=5)
    # Of 41 choices 10 are of Berlin, 20 of expert 0, and 10 of both together.
    assert (first[0].word, first[0].count) == ("Berlin", 10)
    assert first[0].pmi == pytest.approx(math.log2(10 * 41 / (10 * 20)))
    assert [score.word for score in second] == ["the"]
    assert [score.word for score in expert_words(selected_TH, words, min_count=1)[1]] == ["rare", "the"]


def test_the_table_cannot_be_broken_by_words() -> None:
    words = expert_words(torch.ones(3, 1, dtype=torch.bool), ["a|b<script>"] * 3, min_count=1)
    table = words_table({"encoder": words}, {"encoder": torch.tensor([0.25])})
    assert "| encoder | 0 | 25.0% | a&#124;b&lt;script> (1.0) |" in table


def test_there_must_be_a_word_for_every_token() -> None:
    with pytest.raises(MixheadError, match="2 words for 3 tokens"):
        expert_words(torch.ones(3, 1, dtype=torch.bool), ["a", "b"])


def text_of(blocks: int, rng: np.random.Generator) -> tuple[list[str], np.ndarray, torch.Tensor]:
    """Words as frequent as in a language, their blocks of 64, and heads that go on from token to token."""
    tokens, heads = 64 * blocks, 9
    words = [f"word{number}" for number in np.minimum(rng.zipf(1.3, tokens), 400)]
    drawn_TH, kept_TH = rng.random((tokens, heads)) < 0.7, rng.random((tokens, heads)) < 0.6
    since_TH = np.maximum.accumulate(np.where(kept_TH, 0, np.arange(tokens)[:, None]), 0)
    return words, np.arange(tokens) // 64, torch.from_numpy(np.take_along_axis(drawn_TH, since_TH, 0))


def test_words_are_listed_by_chance_in_at_most_5_of_100_texts() -> None:
    rng = np.random.default_rng(0)
    wrong = always = 0
    for _ in range(100):
        words, block_T, selected_TH = text_of(20, rng)
        always += any(expert_words(selected_TH, words, min_count=3))
        wrong += any(expert_words(selected_TH, words, min_count=3, block_T=block_T))
    assert always == 100
    assert wrong <= 5


def test_a_word_that_uses_a_head_is_listed_and_one_that_stands_in_one_place_alone_is_not() -> None:
    words, block_T, selected_TH = text_of(20, np.random.default_rng(1))
    for place in range(5, len(words), 40):
        words[place] = "often"
        selected_TH[place, 2] = True
    selected_TH[:16, 4], words[:16] = True, ["once"] * 16
    found = expert_words(selected_TH, words, min_count=3, block_T=block_T)
    assert [[score.word for score in of] for of in found] == [[], [], ["often"], [], [], [], [], [], []]
