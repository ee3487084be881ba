"""The `Routing` value: its statistics and its balance loss. Padding never counts, whatever stands there."""

import pytest
import torch

from mixhead.errors import MixheadError
from mixhead.routing import Routing, balance_loss


def uniform(tokens, heads, top_k):
    """Every head equally likely, and selected by equally many tokens."""
    first_N1 = torch.arange(tokens).unsqueeze(-1)
    selected_BNH = ((torch.arange(heads) - first_N1) % heads < top_k).unsqueeze(0)
    return torch.full((1, tokens, heads), 1 / heads), selected_BNH


def collapsed(tokens, heads, top_k):
    """All tokens on the same heads, with all of the probability."""
    selected_BNH = (torch.arange(heads) < top_k).expand(1, tokens, heads)
    return selected_BNH.float() / top_k, selected_BNH


@pytest.mark.parametrize(("heads", "top_k"), [(4, 1), (6, 2), (8, 8), (1, 1)])
def test_balance_loss_is_k_at_uniform_routing_and_e_at_collapse(heads, top_k):
    tokens = 5 * heads
    torch.testing.assert_close(balance_loss(*uniform(tokens, heads, top_k), heads), torch.tensor(float(top_k)))
    torch.testing.assert_close(balance_loss(*collapsed(tokens, heads, top_k), heads), torch.tensor(float(heads)))


def test_balance_loss_is_e_times_the_loss_of_the_paper():
    probs_BNH, selected_BNH = torch.randn(2, 9, 5).softmax(-1), torch.rand(2, 9, 5) < 0.4
    paper = sum(probs_BNH[..., i].mean() * selected_BNH[..., i].float().mean() for i in range(5))
    torch.testing.assert_close(balance_loss(probs_BNH, selected_BNH, 5), 5 * paper)


def test_the_gradient_of_the_balance_loss_flows_through_the_probabilities_only():
    probs_BNH = torch.full((1, 3, 2), 0.5, requires_grad=True)
    selected_BNH = torch.tensor([[[True, False], [True, False], [False, True]]])
    balance_loss(probs_BNH, selected_BNH, 2).backward()
    # E * f_i / tokens: pressure on a head grows with the share of the tokens that selected it.
    torch.testing.assert_close(probs_BNH.grad, torch.tensor([2 * 2 / 3 / 3, 2 * 1 / 3 / 3]).expand(1, 3, 2))


@pytest.mark.parametrize("rubbish", [0.0, 1e9, torch.inf, torch.nan])
def test_padding_never_counts(rubbish):
    probs_BNH, selected_BNH = torch.randn(1, 7, 4).softmax(-1), torch.rand(1, 7, 4) < 0.5
    short = Routing(selected_BNH.float(), selected_BNH, probs_BNH, num_routed_heads=4)
    padding = torch.full((1, 3, 4), rubbish)
    selected_padding = torch.ones(1, 3, 4, dtype=torch.bool)
    padded = Routing(
        gates_BNH=torch.cat([padding, short.gates_BNH], 1),
        selected_BNH=torch.cat([selected_padding, selected_BNH], 1),
        probs_BNH=torch.cat([padding, probs_BNH], 1),
        num_routed_heads=4,
        token_mask_BN=torch.arange(10).unsqueeze(0) >= 3,
    )
    torch.testing.assert_close(padded.balance_loss, short.balance_loss)
    torch.testing.assert_close(padded.load_H, short.load_H)
    torch.testing.assert_close(padded.active_share, short.active_share)


def test_sequences_of_a_batch_count_by_their_real_tokens():
    # Two real tokens in the first sequence, one in the second: thirds, not halves of halves.
    selected_BNH = torch.tensor([[[True, False], [True, False]], [[False, True], [False, True]]])
    token_mask_BN = torch.tensor([[True, True], [True, False]])
    routing = Routing(selected_BNH.float(), selected_BNH, token_mask_BN=token_mask_BN)
    torch.testing.assert_close(routing.load_H, torch.tensor([2 / 3, 1 / 3]))
    torch.testing.assert_close(routing.active_share, torch.tensor(0.5))


def test_one_mask_row_serves_the_whole_batch():
    selected_BNH = torch.rand(3, 4, 2) < 0.5
    row = torch.tensor([[True, True, False, True]])
    one = Routing(selected_BNH.float(), selected_BNH, token_mask_BN=row)
    all_rows = Routing(selected_BNH.float(), selected_BNH, token_mask_BN=row.expand(3, 4))
    assert one.load_H.equal(all_rows.load_H)
    assert one.load_H.max() <= 1


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3)])
def test_no_real_token_gives_zero_and_not_nan(shape):
    selected_BNH = torch.ones(*shape, 4, dtype=torch.bool)
    nobody = torch.zeros(shape, dtype=torch.bool)
    routing = Routing(selected_BNH.float(), selected_BNH, selected_BNH.float() / 4, 4, token_mask_BN=nobody)
    assert routing.load_H.tolist() == [0, 0, 0, 0]
    assert routing.balance_loss == 0
    unmasked = Routing(selected_BNH.float()[:0], selected_BNH[:0], selected_BNH.float()[:0], 4)
    assert unmasked.balance_loss == 0


@pytest.mark.parametrize(
    "token_mask",
    [
        torch.ones(2, 3, dtype=torch.long),  # what a tokenizer returns
        torch.ones(2, 3),
        torch.ones(2, 4, dtype=torch.bool),
        torch.ones(2, 1, dtype=torch.bool),
        torch.ones(3, dtype=torch.bool),
    ],
)
def test_a_token_mask_that_does_not_fit_is_refused(token_mask):
    selected_BNH = torch.ones(2, 3, 4, dtype=torch.bool)
    routing = Routing(selected_BNH.float(), selected_BNH, token_mask_BN=token_mask)
    with pytest.raises(MixheadError, match=r"token_mask_BN must be torch.bool of shape \[2, 3\]"):
        _ = routing.load_H


def test_statistics_are_float32_also_in_bfloat16():
    # 257 tokens: bfloat16 cannot count that far.
    gates_BNH = torch.ones(1, 257, 2, dtype=torch.bfloat16)
    routing = Routing(gates_BNH, gates_BNH != 0, gates_BNH / 2, num_routed_heads=2)
    assert routing.load_H.dtype == routing.balance_loss.dtype == torch.float32
    assert routing.load_H.tolist() == [1, 1]
    assert routing.balance_loss == 2


def test_from_gates_selects_where_the_gate_is_not_zero():
    gates_BNH = torch.tensor([[[0.5, 0.0, -2.0, -0.0]]])
    routing = Routing.from_gates(gates_BNH)
    assert routing.selected_BNH.tolist() == [[[True, False, True, False]]]
    assert routing.gates_BNH is gates_BNH
    assert routing.balance_loss == 0, "nothing competes, so there is nothing to balance"
    assert routing.active_share == 0.5


@pytest.mark.parametrize("gates", [torch.ones(2, 3), torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, dtype=torch.bool)])
def test_from_gates_refuses_what_is_no_gate_tensor(gates):
    with pytest.raises(MixheadError, match=r"gates_BNH must be a floating point tensor of shape \[batch, tokens"):
        Routing.from_gates(gates)


def test_a_routing_cannot_be_changed():
    routing = Routing.from_gates(torch.ones(1, 1, 1))
    with pytest.raises(AttributeError):
        routing.gates_BNH = torch.zeros(1, 1, 1)
