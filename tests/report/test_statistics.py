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


def walks(tokens, share_H, stays_H, rng):
    """Heads whose use goes on from token to token with probability `stays_H`, else is drawn anew: bool [T, H]."""
    drawn_TH = rng.random((tokens, len(share_H))) < share_H
    kept_TH = rng.random(drawn_TH.shape) < stays_H
    since_TH = np.maximum.accumulate(np.where(kept_TH, 0, np.arange(tokens)[:, None]), 0)
    return np.take_along_axis(drawn_TH, since_TH, 0)


SHARES_H = np.tile([0.02, 0.05, 0.1, 0.3, 0.5, 0.75, 0.9, 0.95], 4)
STAYS_H = np.repeat([0.0, 0.5, 0.8, 0.9], 8)


@pytest.mark.parametrize("blocks", [4, 12, 60])
def test_the_band_holds_the_true_load_19_times_in_20(blocks):
    """Also of rare heads, where standard errors on either side would end below 0, or be 0 by chance."""
    rng = np.random.default_rng(0)
    held_NH = []
    for _ in range(100):
        selected_TH = walks(64 * blocks, SHARES_H, STAYS_H, rng)
        low_H, high_H = load_of(selected_TH, np.arange(64 * blocks) // 64).band_H2.T
        held_NH.append((low_H <= SHARES_H) & (high_H >= SHARES_H))
    coverage_H = np.mean(held_NH, 0)
    assert 0.935 < coverage_H.mean() < 0.99
    assert coverage_H.reshape(4, 8).mean(1).min() > 0.91  # tokens 10 apart still alike: 0.35 of that at the next block


def test_a_band_over_tokens_would_hold_the_true_load_of_dependent_tokens_far_more_rarely():
    held = naive = 0
    for _ in range(400):
        use_X = RNG.random(60) < 0.4
        selected_TH = np.repeat(use_X, 16)[:, None]
        load = load_of(selected_TH, np.arange(960) // 16)
        low, high = load.band_H2[0]
        held += low <= 0.4 <= high
        error = np.sqrt(load.share_H[0] * (1 - load.share_H[0]) / 960)
        naive += abs(load.share_H[0] - 0.4) <= 1.96 * error
    assert 0.91 < held / 400 < 0.99
    assert naive / 400 < 0.6


def test_a_head_that_no_token_used_may_still_be_used_by_some():
    load = load_of(np.zeros((960, 1), bool), np.arange(960) // 64)
    low, high = load.band_H2[0]
    assert low == 0
    assert 0.1 < high < 0.3  # 15 blocks without it


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


def halves(first, second, rng):
    """Loads of two groups of blocks of one text, drawn at random."""
    blocks = first + second
    selected_TH = walks(64 * blocks, SHARES_H, STAYS_H, rng)
    block_T = np.arange(64 * blocks) // 64
    here_T = np.isin(block_T, rng.permutation(blocks)[:first])
    return load_of(selected_TH[here_T], block_T[here_T]), load_of(selected_TH[~here_T], block_T[~here_T])


@pytest.mark.parametrize(("first", "second"), [(10, 10), (10, 40), (30, 30)])
def test_halves_of_one_text_differ_significantly_in_at_most_5_of_100_splits(first, second):
    """The promise: at most 5% false discoveries. Here every discovery is false, so none may be made in 95 of 100."""
    rng = np.random.default_rng(1)
    splits = 200 if first + second == 20 else 80
    wrong = sum((difference(*halves(first, second, rng)).adjusted_H < 0.05).any() for _ in range(splits))
    assert wrong / splits <= 0.05


def test_groups_within_the_same_blocks_differ_significantly_by_chance_as_rarely():
    """As parts of speech: one token in 20 of every block against the others of the same blocks."""
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(200):
        selected_TH = walks(64 * 20, SHARES_H, STAYS_H, rng)
        block_T, rare_T = np.arange(64 * 20) // 64, rng.random(64 * 20) < 0.05
        loads = load_by(selected_TH, rare_T, block_T)
        wrong += (difference(loads[True], loads[False]).adjusted_H < 0.05).any()
    assert wrong / 200 <= 0.05


@pytest.mark.parametrize("blocks", [3, 5, 9])
def test_too_few_blocks_are_refused_a_test(blocks):
    found = difference(*halves(blocks, 20, RNG))
    assert found.refused.startswith(f"No test: there are {blocks} and 20 blocks of tokens, and it takes 10 of each to")
    assert np.isnan(found.p_H).all()
    assert np.isnan(found.adjusted_H).all()
    assert np.isfinite(found.share_H).all()


def test_a_difference_that_is_there_is_found():
    loads = [
        load_of(walks(64 * 30, np.full(8, share), np.full(8, 0.5), RNG), np.arange(64 * 30) // 64)
        for share in (0.4, 0.6)
    ]
    found = difference(*loads)
    assert found.refused == ""
    assert found.share_H.mean() == pytest.approx(-0.2, abs=0.06)
    assert (found.adjusted_H < 0.001).all()
    always, never = (
        load_of(np.ones((640, 1), bool), np.arange(640) // 64),
        load_of(np.zeros((640, 1), bool), np.arange(640) // 64),
    )
    assert 0 < difference(always, never).p_H[0] < 0.001
    assert difference(always, always).p_H[0] == 1


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
