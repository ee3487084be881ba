"""Top-k selection: exactly k heads of every token, the ones with the largest scores, whatever the scores are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixhead.routing import grouped_top_k_mask, top_k_mask


def test_the_largest_scores_are_selected():
    scores_BNH = torch.tensor([[[0.1, 0.9, -3.0, 0.5], [4.0, 3.0, 2.0, 1.0]]])
    assert top_k_mask(scores_BNH, 2).tolist() == [[[False, True, False, True], [True, True, False, False]]]


@pytest.mark.parametrize("k", [0, 1, 3, 5])
@pytest.mark.parametrize("scores", [0.0, torch.inf, -torch.inf, torch.nan])
def test_exactly_k_where_all_scores_tie(scores, k):
    assert (top_k_mask(torch.full((2, 3, 5), scores), k).sum(-1) == k).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exactly_k_where_rounding_makes_ties(dtype):
    scores_BNH = (torch.randn(4, 50, 12) * 2).round().to(dtype)
    mask_BNH = top_k_mask(scores_BNH, 5)
    assert (mask_BNH.sum(-1) == 5).all()
    smallest_in = scores_BNH.masked_fill(~mask_BNH, torch.inf).amin(-1)
    largest_out = scores_BNH.masked_fill(mask_BNH, -torch.inf).amax(-1)
    assert (smallest_in >= largest_out).all()


def test_groups_select_the_best_of_each_run_of_heads():
    scores_BNH = torch.tensor([[[9.0, 8.0, 7.0, 1.0, 2.0, 3.0]]])
    assert grouped_top_k_mask(scores_BNH, 2, num_groups=2).tolist() == [[[True, False, False, False, False, True]]]
    assert grouped_top_k_mask(scores_BNH, 2, num_groups=1).tolist() == [[[True, True, False, False, False, False]]]


@given(st.data())
def test_every_group_has_equally_many_heads(data):
    groups, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    k_group = data.draw(st.integers(0, size))
    scores = st.floats(allow_nan=True, allow_infinity=True, width=32)
    row = data.draw(st.lists(scores, min_size=groups * size, max_size=groups * size))
    mask_BNH = grouped_top_k_mask(torch.tensor([[row]]), k_group * groups, groups)
    assert (mask_BNH.unflatten(-1, (groups, size)).sum(-1) == k_group).all()


def test_no_tokens():
    assert top_k_mask(torch.zeros(0, 3, 4), 2).shape == (0, 3, 4)
    assert top_k_mask(torch.zeros(2, 0, 4), 2).shape == (2, 0, 4)
