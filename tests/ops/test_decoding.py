"""A linear router as one operator, alone and with the attention of a new token; the constants of skipped heads."""

import pytest
import torch
from torch.library import opcheck

from mixhead.ops import cpu, head_attention
from mixhead.ops.decoding import DECODE, can_decode
from mixhead.ops.skipped import FILL, fill_skipped
from mixhead.routing import LinearRouter
from mixhead.routing.one_operator import ROUTE, can_route
from mixhead.routing.scores import ScoreProjection

BUILT, WHY_NOT = cpu.available()
pytestmark = pytest.mark.skipif(not BUILT, reason=WHY_NOT)

C = 24
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
HEADS = [(9, 2, 6, 1), (9, 3, 6, 3), (16, 0, 4, 1), (8, 8, 8, 1), (1, 0, 1, 1), (33, 1, 20, 1)]


def make_router(heads, shared, active, groups, dtype=torch.float32):
    return LinearRouter(C, heads, shared, active, groups).to(dtype)


def routed(router, hidden):
    """What the operator says of these hidden states."""
    proj = router.score_proj
    return ROUTE(hidden, proj.weight, proj.bias, router.shared_H, router.active_heads, router.num_groups)


def expected(router, hidden):
    """The same in the operators of PyTorch, which are taken where somebody may ask for a gradient."""
    with torch.enable_grad():
        return router(hidden)


@pytest.mark.parametrize("sizes", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 130)])
def test_the_operator_routes_as_the_router_does(sizes, dtype, shape):
    router, hidden = make_router(*sizes, dtype), torch.randn(*shape, C).to(dtype)
    gates, selected, probs = routed(router, hidden)
    known = expected(router, hidden)
    assert selected.equal(known.selected_BNH)
    assert gates.equal(known.gates_BNH)
    if known.probs_BNH is not None:
        torch.testing.assert_close(probs, known.probs_BNH)


@torch.no_grad()
def test_without_a_gradient_the_router_is_one_operator():
    router, hidden = make_router(9, 2, 6, 1), torch.randn(2, 5, C)
    assert can_route(router.score_proj, hidden)
    routing = router(hidden, token_mask_BN=torch.ones(2, 5, dtype=torch.bool))
    known = expected(router, hidden)
    assert (routing.num_routed_heads, routing.heads_per_group, routing.num_groups) == (7, 6, 1)
    assert routing.token_mask_BN.all()
    torch.testing.assert_close(routing.balance_loss, known.balance_loss)


def test_where_numbers_are_not_all_that_is_asked_it_is_not_taken():
    proj, hidden = ScoreProjection(C, 4), torch.randn(1, 1, C)
    assert not can_route(proj, hidden), "a gradient may be asked for"
    with torch.no_grad():
        assert can_route(proj, hidden)
        assert not can_route(proj, hidden.double())
        assert not can_route(ScoreProjection(C, 4).bfloat16(), hidden)
        assert not can_route(ScoreProjection(C, 4, device="meta"), hidden), "offloaded"
        hooked = ScoreProjection(C, 4)
        hooked.register_forward_pre_hook(lambda *_: None)
        assert not can_route(hooked, hidden), "a hook may bring the weights"
        assert not can_route(torch.nn.Bilinear(C, C, 4), hidden), "an adapter knows how it computes"
        assert not torch.func.vmap(lambda x: torch.tensor(can_route(proj, x)))(hidden).any()


@torch.no_grad()
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_broken_hidden_states_displace_no_shared_head(broken):
    router, hidden = make_router(6, 2, 3, 1), torch.randn(1, 3, C)
    hidden[0, 1] = broken
    _, selected, _ = routed(router, hidden)
    assert selected[..., :2].all()
    assert (selected.sum(-1) == 3).all()


@torch.no_grad()
def test_of_equal_scores_exactly_so_many_are_selected():
    router = make_router(9, 2, 6, 1)
    router.score_proj.weight.zero_()
    _, selected, _ = routed(router, torch.randn(1, 7, C))
    assert (selected.sum(-1) == 6).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "sizes"), [(3, (9, 2, 6, 1)), (1, (9, 3, 6, 3)), (16, (16, 0, 4, 1))])
@pytest.mark.parametrize("keys", [1, 33, 1000])
@pytest.mark.parametrize("constants", [True, False])
def test_one_operator_decodes_what_several_do(dtype, kv_heads, sizes, keys, constants):
    batch, heads, head_dim = 2, sizes[0], 40
    router, hidden = make_router(*sizes, dtype), torch.randn(batch, 1, C).to(dtype)
    q = torch.randn(batch, 1, heads, head_dim).to(dtype).transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads, keys, head_dim).to(dtype) for _ in range(2))
    skipped = torch.randn(heads, head_dim).to(dtype) if constants else None
    proj = router.score_proj
    out = DECODE(hidden, proj.weight, proj.bias, router.shared_H, skipped, q, k, v, sizes[2], sizes[3], 0.3)
    routing = expected(router, hidden)
    known = head_attention(q, k, v, routing, scale=0.3, impl="reference").transpose(1, 2)
    if constants:
        known = torch.where(routing.selected_BNH.unsqueeze(-1), known, skipped)
    torch.testing.assert_close(out, known, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@torch.no_grad()
def test_what_does_not_fit_is_not_read():
    router, hidden = make_router(8, 0, 4, 1), torch.randn(1, 1, C)
    q, k, v = torch.randn(1, 8, 1, 32), torch.randn(1, 2, 5, 32), torch.randn(1, 2, 5, 32)
    proj = router.score_proj
    given = [hidden, proj.weight, proj.bias, router.shared_H, None, q, k, v, 4, 1, 1.0]
    DECODE(*given)
    misfits = {
        0: torch.randn(2, 1, C),
        1: torch.randn(8, C + 1),
        2: torch.randn(7),
        4: torch.randn(8, 31),
        5: torch.randn(1, 8, 2, 32),
        6: torch.randn(1, 3, 5, 32),
        7: torch.randn(1, 2, 4, 32),
        9: 3,
    }
    for place, misfit in misfits.items():
        with pytest.raises(RuntimeError, match=r"fit|must|divide"):
            DECODE(*given[:place], misfit, *given[place + 1 :])


@torch.no_grad()
def test_several_new_tokens_or_many_heads_for_each_key_are_left_to_several_operators():
    proj, hidden = make_router(64, 0, 8, 1).score_proj, torch.randn(1, 1, C)
    q, k = torch.randn(1, 64, 1, 32), torch.randn(1, 1, 5, 32)
    assert not can_decode(proj, hidden, q, k, k, None)
    assert not can_decode(proj, hidden, torch.randn(1, 64, 2, 32), k, k, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constants_stand_in_for_skipped_heads(dtype):
    selected, constants = torch.rand(2, 70, 5) < 0.5, torch.randn(5, 12)
    out = torch.randn(2, 70, 5, 12).to(dtype)
    known = torch.where(selected.unsqueeze(-1), out, constants.to(dtype))
    with torch.no_grad():
        filled = fill_skipped(out.clone(), selected, constants)
        turned = fill_skipped(out.transpose(1, 2).contiguous().transpose(1, 2), selected, constants)
    assert filled.equal(known)
    assert turned.equal(known) and turned.is_contiguous()
    leaf = constants.requires_grad_()
    differentiable = fill_skipped(out, selected, leaf)
    assert differentiable.equal(known)
    differentiable.float().sum().backward()
    assert leaf.grad[:, 0].equal((~selected).sum((0, 1)).float())


@torch.no_grad()
def test_the_operators_tell_their_shapes():
    router, hidden = make_router(4, 1, 2, 1), torch.randn(2, 1, C)
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 3, 8)
    weights = (router.score_proj.weight.detach(), router.score_proj.bias.detach(), router.shared_H)
    opcheck(ROUTE, (hidden, *weights, 2, 1))
    opcheck(DECODE, (hidden, *weights, torch.randn(4, 8), q, k, k, 2, 1, 0.5))
    opcheck(FILL, (torch.randn(2, 1, 4, 8), torch.rand(2, 1, 4) < 0.5, torch.randn(4, 8)))
