"""Which words go with which expert."""

import math

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
