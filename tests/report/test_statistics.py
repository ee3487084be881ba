"""Statistics of routings, against what is known."""

import numpy as np
import pytest

from mixhead.recording.file import Tokens
from mixhead.report.statistics import (
    Load,
    agreement,
    blocks_of,
    co_activation,
    coefficient_of_variation,
    difference,
    false_discovery,
    in_words,
    load_by,
    load_of,
    position_bins,
    relative_entropy,
)

RNG = np.random.default_rng(0)


def tokens_of(sequences, length):
    index = np.arange(sequences * length, dtype=np.int32)
    return Tokens(index * 0, index * 0, index // length, index % length, {})


def test_blocks_never_span_two_sequences():
    block_T = blocks_of(tokens_of(2, 100), size=64)
    assert [int((block_T == b).sum()) for b in range(4)] == [64, 36, 64, 36]


def test_the_band_holds_the_true_load_of_dependent_tokens_about_19_times_in_20():
    """Tokens of a block share their heads: a band over tokens would hold it far more rarely."""
    held = naive = 0
    for _ in range(400):
        use_X = RNG.random(60) < 0.4
        selected_TH = np.repeat(use_X, 16)[:, None]
        load = load_of(selected_TH, np.arange(960) // 16)
        low, high = load.band_H2[0]
        held += low <= 0.4 <= high
        error = np.sqrt(load.share_H[0] * (1 - load.share_H[0]) / 960)
        naive += abs(load.share_H[0] - 0.4) <= 1.96 * error
    assert 0.91 < held / 400 < 0.98
    assert naive / 400 < 0.6


def test_with_one_block_there_is_no_band():
    load = load_of(np.ones((5, 2), bool), np.zeros(5, int))
    assert load.share_H.tolist() == [1, 1]
    assert np.isnan(load.error_H).all()
    assert load_of(np.ones((0, 2), bool), np.zeros(0, int)).tokens == 0


def test_groups_leave_out_what_has_no_label():
    selected_TH = np.array([[1, 0], [1, 0], [0, 1], [1, 1]], bool)
    by_number = load_by(selected_TH, np.array([3, 3, 1, -1]), np.arange(4))
    assert [*by_number] == [1, 3]
    assert by_number[3].share_H.tolist() == [1, 0]
    by_float = load_by(selected_TH, np.array([0.5, np.nan, 0.5, np.nan], np.float32), np.arange(4))
    assert {value: load.tokens for value, load in by_float.items()} == {0.5: 2}
    assert [*load_by(selected_TH, np.array(["b", "a", "a", "b"]), np.arange(4))] == ["a", "b"]


def test_the_test_of_a_difference_is_right_about_chance_and_finds_what_is_there():
    false = sum(
        difference(*(load_of(RNG.random((300, 1)) < 0.5, np.arange(300) // 3) for _ in range(2))).p_H[0] < 0.05
        for _ in range(400)
    )
    assert 0.02 < false / 400 < 0.085
    one, two = (load_of(RNG.random((900, 1)) < share, np.arange(900) // 3) for share in (0.4, 0.6))
    found = difference(one, two)
    assert found.share_H[0] == pytest.approx(-0.2, abs=0.06)
    assert found.adjusted_H[0] < 1e-6


def test_false_discoveries_as_in_the_textbook():
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.005])
    assert false_discovery(p)[[0, 1, 3, 4]].tolist() == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert np.isnan(false_discovery(p)[2])


def test_evenness():
    assert coefficient_of_variation(np.array([0.5, 0.5])) == 0
    assert coefficient_of_variation(np.array([0.2, 0.6])) == pytest.approx(0.5)
    assert relative_entropy(np.full(4, 0.3)) == pytest.approx(1)
    assert relative_entropy(np.array([1.0, 0.0, 0.0, 0.0])) == 0
    assert relative_entropy(np.array([0.7])) == relative_entropy(np.zeros(3)) == 1


def test_co_activation_is_the_correlation():
    first = RNG.random(500) < 0.5
    selected_TH = np.stack([first, first, ~first, np.ones(500, bool)], -1)
    expected = [[1, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(co_activation(selected_TH), expected, atol=1e-12)


def test_layers_agree_whatever_the_numbers_of_their_heads():
    selected_TH = RNG.random((2000, 4)) < 0.5
    assert agreement(selected_TH, selected_TH[:, [2, 0, 3, 1]]) == pytest.approx(1)
    assert agreement(selected_TH, RNG.random((2000, 6)) < 0.5) < 0.01
    assert agreement(selected_TH, np.ones((2000, 3), bool)) == 0


def test_positions_in_bins_that_double():
    bin_T, names = position_bins(np.array([0, 1, 2, 3, 4, 7, 8]))
    assert [names[b] for b in bin_T] == ["0", "1", "2–3", "2–3", "4–7", "4–7", "8–15"]


def test_dead_and_saturated_heads_in_plain_words():
    loads = {
        "layer 0": Load(np.array([1.0, 1.0, 0.0, 0.5]), np.zeros(4), 9),
        "layer 1": Load(np.array([1.0, 0.5, 0.5, 0.5]), np.zeros(4), 9),
    }
    sentences = in_words(loads, {"layer 0": [0], "layer 1": [0]})
    assert sentences[0] == "Dead: head 2 of layer 0 was used by hardly any token (under 0.1%)."
    assert sentences[1].startswith("Saturated: head 1 of layer 0 was used by practically every token")
    assert sentences[2].startswith("These are 9 tokens, few for such findings")
    assert "least evenly in layer 0" in sentences[3]
    assert in_words({"layer 1": loads["layer 1"]}, {"layer 1": [0]}) == [
        "No head that competes is dead, and none is saturated."
    ]


def test_layers_that_choose_nothing_and_layers_that_are_alike():
    loads = {
        "layer 0": Load(np.array([0.5, 0.5]), np.zeros(2), 9),
        "layer 1": Load(np.array([0.51, 0.49]), np.zeros(2), 9),
        "layer 2": Load(np.ones(2), np.zeros(2), 9),
    }
    assert in_words(loads, {}) == [
        "No head that competes is dead, and none is saturated.",
        "Every token uses all heads of layer 2: no head competes there.",
        "In every layer the competing heads are used alike (entropy at least 1.00 of 1).",
    ]
