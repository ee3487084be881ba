"""The learned two-stage router, against what is known of the official computation (arXiv 2410.11842, eq. 5 and 6)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixhead.errors import MixheadError
from mixhead.routing import OneStageRouter, TwoStageRouter

# heads, shared, top_k
SHAPES = [(4, 2, 1), (6, 3, 2), (5, 0, 2), (5, 1, 2), (4, 4, 0), (4, 1, 3), (3, 0, 3), (1, 0, 1), (1, 1, 0)]


@pytest.mark.parametrize(("heads", "shared", "top_k"), SHAPES)
def test_a_zero_router_gives_every_active_head_the_gate_one(heads, shared, top_k):
    router = TwoStageRouter(16, heads, shared, top_k)
    router.reset_parameters()
    routing = router(torch.randn(2, 5, 16))
    assert routing.selected_BNH[..., :shared].all()
    assert (routing.selected_BNH.sum(-1) == shared + top_k).all()
    torch.testing.assert_close(routing.gates_BNH, routing.selected_BNH.float())


@given(st.integers(1, 8), st.data())
def test_gates_sum_to_what_the_stages_give(heads, data):
    shared = data.draw(st.integers(0, heads))
    top_k = data.draw(st.integers(1, heads - shared)) if shared < heads else 0
    torch.manual_seed(data.draw(st.integers(0, 99)))
    router, hidden_BNC = TwoStageRouter(8, heads, shared, top_k), 3 * torch.randn(2, 4, 8)
    routing = router(hidden_BNC)
    gates_BNH, selected_BNH = routing.gates_BNH, routing.selected_BNH

    assert (selected_BNH.sum(-1) == shared + top_k).all()
    assert (gates_BNH[~selected_BNH] == 0).all()
    assert (gates_BNH >= 0).all()
    if shared and top_k:
        stage_BN2 = 2 * router.stage_proj(hidden_BNC).softmax(-1)
    else:
        stage_BN2 = torch.ones(2, 4, 2)
    torch.testing.assert_close(gates_BNH[..., :shared].sum(-1), stage_BN2[..., 0] * shared)
    torch.testing.assert_close(gates_BNH[..., shared:].sum(-1), stage_BN2[..., 1] * top_k)
    if top_k:
        torch.testing.assert_close(routing.probs_BNH.sum(-1), torch.ones(2, 4))
        assert (routing.probs_BNH[..., :shared] == 0).all()


def test_the_formula_head_by_head():
    router, x = TwoStageRouter(8, 5, 2, 2), torch.randn(8)
    gates_H = router(x.view(1, 1, 8)).gates_BNH[0, 0]
    alpha = (2 * (router.stage_proj.weight @ x).softmax(0)).tolist()
    shared = (router.shared_proj.weight @ x).softmax(0).tolist()
    p = (router.routed_proj.weight @ x).softmax(0).tolist()
    kept = sorted(range(3), key=lambda i: -p[i])[:2]
    expected = [alpha[0] * 2 * s for s in shared]
    expected += [alpha[1] * 2 * p[i] / sum(p[j] for j in kept) if i in kept else 0.0 for i in range(3)]
    torch.testing.assert_close(gates_H, torch.tensor(expected))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_loss_is_top_k_where_probabilities_are_uniform(top_k):
    router = TwoStageRouter(8, 6, 2, top_k)
    router.reset_parameters()
    torch.testing.assert_close(router(torch.randn(2, 30, 8)).balance_loss, torch.tensor(float(top_k)))


def test_balance_loss_of_a_collapsed_router_is_the_number_of_routed_heads():
    router = TwoStageRouter(8, 6, 2, 2)
    router.reset_parameters()
    with torch.no_grad():
        router.routed_proj.weight[:2] = 50.0
    torch.testing.assert_close(router(torch.ones(1, 9, 8)).balance_loss, torch.tensor(4.0))


def test_all_heads_shared_has_weighted_gates_and_nothing_to_balance():
    router, hidden_BNC = TwoStageRouter(8, 4, 4, 0), torch.randn(2, 3, 8)
    routing = router(hidden_BNC)
    torch.testing.assert_close(routing.gates_BNH, 4 * router.shared_proj(hidden_BNC).softmax(-1))
    assert routing.selected_BNH.all()
    assert routing.balance_loss == 0
    assert [name for name, _ in router.named_parameters()] == ["shared_proj.weight"]


def test_parameters_exist_only_where_they_mean_something():
    def shapes(*sizes):
        return {name: tuple(p.shape) for name, p in TwoStageRouter(8, *sizes).named_parameters()}

    both = {"routed_proj.weight": (4, 8), "stage_proj.weight": (2, 8)}
    assert shapes(6, 2, 3) == {**both, "shared_proj.weight": (2, 8)}
    assert shapes(5, 1, 3) == both
    assert shapes(4, 0, 3) == {"routed_proj.weight": (4, 8)}


def test_gradients_reach_every_parameter():
    router = TwoStageRouter(8, 6, 2, 2)
    hidden_BNC = torch.randn(2, 5, 8, requires_grad=True)
    routing = router(hidden_BNC)
    ((routing.gates_BNH * torch.randn(6)).sum() + 0.01 * routing.balance_loss).backward()
    for name, tensor in [*router.named_parameters(), ("hidden_BNC", hidden_BNC)]:
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_routing_is_float32_at_least(dtype):
    router = TwoStageRouter(8, 6, 2, 2).to(dtype)
    routing = router(torch.randn(2, 5, 8, dtype=dtype))
    assert routing.gates_BNH.dtype == torch.promote_types(dtype, torch.float32)
    assert (routing.selected_BNH.sum(-1) == 4).all()


def test_autocast_routes_in_float32():
    with torch.autocast("cpu", torch.bfloat16):
        routing = TwoStageRouter(8, 6, 2, 2)(torch.randn(2, 5, 8))
    assert routing.gates_BNH.dtype == routing.probs_BNH.dtype == torch.float32


@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf])
def test_rubbish_in_one_token_stays_there(rubbish):
    router, hidden_BNC = TwoStageRouter(8, 6, 2, 2), torch.randn(1, 4, 8)
    clean = router(hidden_BNC)
    broken = router(hidden_BNC.index_fill(1, torch.tensor([2]), rubbish))
    assert (broken.selected_BNH.sum(-1) == 4).all()
    others = [0, 1, 3]
    assert broken.gates_BNH[:, others].equal(clean.gates_BNH[:, others])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((4, 3, 2), "shared_heads=3 and top_k=2 do not fit into num_heads=4"),
        ((4, -1, 2), "shared_heads=-1"),
        ((4, 2, -1), "top_k=-1"),
        ((4, 5, 0), "shared_heads=5"),
        ((4, 2, 0), "top_k=0 leaves 2 of 4 heads unused for ever"),
    ],
)
def test_impossible_numbers_are_refused(sizes, message):
    with pytest.raises(MixheadError, match=message):
        TwoStageRouter(8, *sizes)


def test_one_stage_routing_is_two_stage_routing_with_even_stages():
    two, one = TwoStageRouter(8, 6, 2, 2), OneStageRouter(8, 6, 2, 2)
    one.load_state_dict(two.state_dict(), strict=False)
    torch.nn.init.zeros_(two.stage_proj.weight)
    hidden_BNC = torch.randn(2, 5, 8)
    torch.testing.assert_close(one(hidden_BNC).gates_BNH, two(hidden_BNC).gates_BNH)
    assert "stage_proj.weight" not in one.state_dict()
