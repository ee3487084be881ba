"""Routers with 0 / 1 gates: the norm of the query, and linear scores. Gradients go straight through selected heads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixhead.errors import MixheadError
from mixhead.routing import LinearRouter, QueryNormRouter, soft_selection, top_k_mask

KINDS = ["linear", "query_norm"]
C, D = 8, 4
# heads, shared, active, groups: the usual, none shared, one active, nothing left to route, all shared, all active
SHAPES = [
    (6, 2, 4, 1),
    (6, 0, 3, 1),
    (6, 0, 1, 1),
    (6, 3, 3, 1),
    (6, 6, 6, 1),
    (6, 2, 6, 1),
    (8, 2, 4, 2),
    (8, 0, 4, 4),
]


def make(kind, heads, shared, active, groups=1):
    if kind == "linear":
        return LinearRouter(C, heads, shared, active, groups)
    return QueryNormRouter(heads, shared, active, groups)


def inputs(heads, batch=2, tokens=5, dtype=torch.float32):
    """Hidden states [B, N, C] and queries [B, H, N, D], both with gradient."""
    hidden_BNC = torch.randn(batch, tokens, C, dtype=dtype, requires_grad=True)
    return hidden_BNC, torch.randn(batch, heads, tokens, D, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "shared", "active", "groups"), SHAPES)
def test_gates_are_exactly_zero_and_one(kind, heads, shared, active, groups):
    router = make(kind, heads, shared, active, groups)
    routing = router(*inputs(heads))
    assert (routing.selected_BNH.sum(-1) == active).all()
    assert routing.selected_BNH[..., router.shared_H].all()
    assert routing.gates_BNH.equal(routing.selected_BNH.float())
    in_group = routing.selected_BNH.unflatten(-1, (groups, -1)).sum(-1)
    assert (in_group == active // groups).all()
    if shared < heads:
        assert routing.slots(groups) == active // groups, "what holds by construction is promised to the operators"


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_invariants(kind, data):
    groups, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    active = data.draw(st.integers(1, size))
    shared = data.draw(st.integers(0, active))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    heads = groups * size
    router = make(kind, heads, groups * shared, groups * active, groups)
    # Any heads may be shared, here not the first ones.
    router.shared_H.copy_(router.shared_H.unflatten(0, (groups, size)).flip(1).flatten())
    hidden_BNC, q_BHND = inputs(heads)
    routing = router(hidden_BNC, q_BHND)
    assert (routing.selected_BNH.unflatten(-1, (groups, size)).sum(-1) == active).all()
    assert routing.selected_BNH[..., router.shared_H].all()
    assert routing.gates_BNH.equal(routing.selected_BNH.float())
    assert routing.balance_loss.isfinite()
    with torch.no_grad():
        evaluated = router(hidden_BNC, q_BHND)
    assert evaluated.selected_BNH.equal(routing.selected_BNH), "training and evaluation select the same heads"


@pytest.mark.parametrize(("heads", "shared", "active", "groups"), SHAPES)
def test_the_gradient_reaches_selected_heads_that_are_not_shared_and_no_others(heads, shared, active, groups):
    router = make("linear", heads, shared, active, groups)
    hidden_BNC, _ = inputs(heads, batch=1, tokens=1)
    routing = router(hidden_BNC)
    if shared == heads or active == heads:
        assert not routing.gates_BNH.requires_grad, "there is nothing to decide, so there is nothing to learn"
        return
    routing.gates_BNH.sum().backward()
    gradient_H = router.score_proj.weight.grad.abs().sum(-1)
    learns_H = routing.selected_BNH[0, 0] & ~router.shared_H
    assert gradient_H.isfinite().all()
    assert ((gradient_H > 0) == learns_H).all()


def test_the_straight_through_gradient_is_that_of_the_soft_selection():
    router = make("linear", 6, 2, 4)
    hidden_BNC, _ = inputs(6)
    direction_H = torch.randn(6)
    routing = router(hidden_BNC)
    (gradient,) = torch.autograd.grad((routing.gates_BNH * direction_H).sum(), router.score_proj.weight)
    scores_BNH = router.score_proj(hidden_BNC)
    ranked_BNH = scores_BNH.masked_fill(router.shared_H, torch.inf)
    soft_BNH = soft_selection(scores_BNH, ranked_BNH, 4) * (routing.selected_BNH & ~router.shared_H)
    (expected,) = torch.autograd.grad((soft_BNH * direction_H).sum(), router.score_proj.weight)
    torch.testing.assert_close(gradient, expected)


def test_soft_selection_is_one_half_at_the_threshold_between_the_last_head_in_and_the_first_one_out():
    scores_BNH = torch.tensor([[[4.0, 3.0, 1.0, 0.0]]])
    torch.testing.assert_close(
        soft_selection(scores_BNH, scores_BNH, 2), torch.tensor([[[2.0, 1.0, -1.0, -2.0]]]).sigmoid()
    )
    # With two groups each has its own threshold: 3.5 and 0.5.
    torch.testing.assert_close(
        soft_selection(scores_BNH, scores_BNH, 2, num_groups=2), torch.tensor([[[0.5, -0.5, 0.5, -0.5]]]).sigmoid()
    )
    # Head 0 is shared and fills the only place: the best of the others is the threshold.
    ranked_BNH = torch.tensor([[[torch.inf, 3.0, 1.0, 0.0]]])
    assert soft_selection(scores_BNH, ranked_BNH, 1)[0, 0, 1] == 0.5


def test_query_norm_selects_the_largest_norms_among_the_routed_heads():
    router = QueryNormRouter(8, 3, 5)
    _, q_BHND = inputs(8, tokens=50)
    expected_BNE = top_k_mask(q_BHND.norm(dim=-1).transpose(1, 2)[..., 3:], 2)
    assert router(None, q_BHND).selected_BNH[..., 3:].equal(expected_BNE)


def test_query_norm_scores_are_the_official_ones():
    router = QueryNormRouter(8, 3, 5)
    _, q_BHND = inputs(8)
    norms_BNE = q_BHND.norm(dim=-1).transpose(1, 2)[..., 3:]
    official_BNE = (norms_BNE / norms_BNE.std(dim=-1, keepdim=True)).softmax(-1)
    probs_BNH = router(None, q_BHND).probs_BNH
    torch.testing.assert_close(probs_BNH[..., 3:], official_BNE)
    assert (probs_BNH[..., :3] == 0).all()


@pytest.mark.parametrize(("shared", "active"), [(0, 2), (1, 2), (3, 4), (2, 2), (3, 3)])
@pytest.mark.parametrize("value", [1.0, 0.0, 1e-3, 100.0])
def test_equal_norms_do_not_divide_by_their_spread_of_zero(shared, active, value):
    router = QueryNormRouter(4, shared, active)
    q_BHND = torch.full((2, 4, 3, D), value, requires_grad=True)
    routing = router(None, q_BHND)
    assert (routing.selected_BNH.sum(-1) == active).all()
    assert routing.gates_BNH.equal(routing.selected_BNH.float())
    assert routing.probs_BNH.isfinite().all()
    ((routing.gates_BNH * torch.randn(4)).sum() + routing.balance_loss).backward()
    assert q_BHND.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_norms_in_half_precision_route_as_in_double(dtype):
    # The square of a norm of 3000 is beyond float16.
    q_BHND = (1500 * torch.randn(2, 8, 40, D)).to(dtype)
    router = QueryNormRouter(8, 2, 5)
    routing = router(None, q_BHND)
    assert routing.selected_BNH.equal(router(None, q_BHND.double()).selected_BNH)
    assert routing.probs_BNH.dtype == torch.float32
    assert routing.probs_BNH.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_linear_scores_in_every_dtype(dtype):
    router = LinearRouter(C, 8, 2, 5).to(dtype)
    hidden_BNC, _ = inputs(8, tokens=40, dtype=dtype)
    routing = router(hidden_BNC)
    assert routing.gates_BNH.dtype == torch.promote_types(dtype, torch.float32), "routing is float32 at least"
    assert (routing.selected_BNH.sum(-1) == 5).all()
    assert set(routing.gates_BNH.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("autocast", [False, True])
def test_linear_scores_are_not_rounded_to_half_precision(autocast):
    # Two scores that bfloat16 cannot tell apart: head 1 wins, in every batch and on every machine.
    router = LinearRouter(C, 2, 0, 1).to(torch.float32 if autocast else torch.bfloat16)
    with torch.no_grad():
        router.score_proj.weight.zero_()
        router.score_proj.weight[:, 0] = 1.0
        router.score_proj.weight[1, 1] = 2**-10
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        routing = router(torch.ones(1, 20, C, dtype=router.score_proj.weight.dtype))
    assert routing.selected_BNH[..., 1].all()


def test_an_adapter_on_the_scores_is_not_bypassed():
    class Adapted(torch.nn.Linear):
        def forward(self, hidden_BNC):
            return super().forward(hidden_BNC) + torch.tensor([0.0, 100.0, 0.0, 0.0])

    router = make("linear", 4, 0, 1)
    router.score_proj = Adapted(C, 4)
    assert router(torch.randn(1, 9, C)).selected_BNH[..., 1].all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, -torch.inf])
def test_rubbish_in_one_token_stays_there_and_shared_heads_stay_shared(kind, rubbish):
    router = make(kind, 6, 2, 3)
    hidden_BNC, q_BHND = (t.detach() for t in inputs(6))
    clean = router(hidden_BNC, q_BHND)
    broken = router(
        hidden_BNC.index_fill(1, torch.tensor([3]), rubbish), q_BHND.index_fill(2, torch.tensor([3]), rubbish)
    )
    assert broken.selected_BNH[..., :2].all()
    assert (broken.selected_BNH.sum(-1) == 3).all()
    others = [0, 1, 2, 4]
    assert broken.selected_BNH[:, others].equal(clean.selected_BNH[:, others])
    assert broken.gates_BNH[:, others].equal(clean.gates_BNH[:, others])


def test_a_score_of_minus_infinity_forbids_a_head():
    router = make("linear", 4, 1, 2)
    with torch.no_grad():
        router.score_proj.bias[2] = -torch.inf
    assert not router(torch.randn(3, 50, C)).selected_BNH[..., 2].any()


def test_the_first_heads_of_every_group_are_shared_at_first():
    assert make("linear", 6, 2, 4).shared_H.tolist() == [True, True, False, False, False, False]
    assert make("linear", 6, 2, 4, groups=2).shared_H.tolist() == [True, False, False, True, False, False]


def test_shared_heads_travel_with_the_state_dict():
    router = make("linear", 4, 1, 2)
    router.shared_H.copy_(torch.tensor([False, False, True, False]))
    fresh = make("linear", 4, 1, 2)
    fresh.load_state_dict(router.state_dict())
    assert fresh.shared_H.tolist() == [False, False, True, False]
    hidden_BNC, _ = inputs(4)
    assert fresh(hidden_BNC).gates_BNH.equal(router(hidden_BNC).gates_BNH)


@pytest.mark.parametrize("kind", KINDS)
def test_balance_loss_leaves_out_padding_and_shared_heads(kind):
    router = make(kind, 6, 2, 4)
    hidden_BNC, q_BHND = (t.detach() for t in inputs(6, batch=1))
    token_mask_BN = torch.tensor([[False, True, True, True, True]])
    hidden_BNC[:, 0], q_BHND[:, :, 0] = torch.nan, torch.nan
    padded = router(hidden_BNC, q_BHND, token_mask_BN)
    short = router(hidden_BNC[:, 1:], q_BHND[:, :, 1:])
    torch.testing.assert_close(padded.balance_loss, short.balance_loss)
    assert padded.load_H.equal(short.load_H)
    assert short.num_routed_heads == 4
    # Uniform routing of 2 of 4 heads costs 2; no routing costs less than a uniform one by much.
    assert 1.0 < short.balance_loss < 4.0


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_balance_where_all_heads_are_shared(kind):
    routing = make(kind, 4, 4, 4)(*inputs(4))
    assert routing.selected_BNH.all()
    assert routing.probs_BNH is None
    assert routing.balance_loss == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_balance_loss_teaches_where_heads_compete(kind):
    router = make(kind, 6, 2, 4)
    hidden_BNC, q_BHND = inputs(6)
    router(hidden_BNC, q_BHND).balance_loss.backward()
    learned = router.score_proj.weight if kind == "linear" else q_BHND
    assert learned.grad.isfinite().all()
    assert learned.grad.abs().sum() > 0


def test_routers_without_queries_say_so():
    assert not LinearRouter.needs_query
    assert QueryNormRouter.needs_query
    with pytest.raises(MixheadError, match="needs the queries q_BHND, but it received None"):
        QueryNormRouter(4, 1, 2)(torch.randn(1, 2, C), None)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((4, 3, 2), "shared_heads=3, active_heads=2 and num_heads=4 do not fit"),
        ((4, 0, 0), "active_heads >= 1"),
        ((4, 1, 5), "active_heads=5"),
        ((4, -1, 2), "shared_heads=-1"),
        ((6, 2, 3, 2), "not all multiples of 2"),
        ((6, 1, 4, 2), "not all multiples of 2"),
        ((6, 2, 4, 4), "each of the 4 key-value groups"),
        ((6, 2, 4, 0), "each of the 0 key-value groups"),
    ],
)
def test_impossible_numbers_are_refused(sizes, message):
    for kind in KINDS:
        with pytest.raises(MixheadError, match=message):
            make(kind, *sizes)
