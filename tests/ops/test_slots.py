"""Slots: what they need, when they are chosen, and what the tests of all engines cannot ask of a balanced selection."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from mixhead.errors import MixheadError
from mixhead.ops import cpu, explain, head_attention
from mixhead.ops.attention import slots
from mixhead.routing import Routing
from mixhead.routing.selection import grouped_top_k_mask


def make(tokens=13, *, heads=6, kv_heads=2, count=2, batch=2, dtype=torch.float32, promised=True):
    """q, k, v and a routing with `count` heads of every group for every token."""
    q = torch.randn(batch, heads, tokens, 8, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, tokens, 8, dtype=dtype) for _ in range(2))
    selected = grouped_top_k_mask(torch.rand(batch, tokens, heads), count * kv_heads, kv_heads)
    promise = {"heads_per_group": count, "num_groups": kv_heads} if promised else {}
    return q, k, v, Routing(selected * torch.rand(batch, tokens, heads, dtype=dtype), selected, **promise)


@pytest.mark.parametrize("promised", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_the_result_is_that_of_the_stock_kernel(promised, dtype, causal):
    q, k, v, routing = make(70, dtype=dtype, promised=promised)
    stock = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    gates_BHN1 = routing.gates_BNH.transpose(1, 2).unsqueeze(-1)
    torch.testing.assert_close(head_attention(q, k, v, routing, causal=causal, impl="slots"), stock * gates_BHN1)


def test_fewer_heads_reach_the_stock_kernel(monkeypatch):
    seen = []

    def stock(q, *args, **kwargs):
        seen.append((q.shape[1], kwargs["is_causal"], kwargs["attn_mask"]))
        return original(q, *args, **kwargs)

    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", stock)
    head_attention(*make(heads=8, kv_heads=2, count=1), causal=True, impl="slots")
    assert seen == [(2, True, None)], "2 of 8 heads, and the causal flag instead of a mask"


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_selected_never_reaches_the_output_or_a_gradient(poison):
    q, k, v, routing = make()
    unused_BNH = ~routing.selected_BNH
    unused_BHN1 = unused_BNH.transpose(1, 2).unsqueeze(-1)
    results = []
    for value in (0.0, poison):
        leaves = [t.clone().requires_grad_() for t in (q.masked_fill(unused_BHN1, value), k, v)]
        gates = routing.gates_BNH.masked_fill(unused_BNH, value).requires_grad_()
        out = head_attention(*leaves, Routing(gates, routing.selected_BNH), causal=True, impl="slots")
        results.append([out, *torch.autograd.grad(out.square().sum(), [*leaves, gates])])
    assert all(clean.equal(dirty) for clean, dirty in zip(*results, strict=True))
    assert results[1][1].masked_select(unused_BHN1).eq(0).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("promised", [True, False])
def test_where_nothing_is_selected_nothing_reaches_the_output_or_a_gradient(poison, promised):
    q, k, v, routing = make(count=0, promised=promised)
    leaves = [t.requires_grad_() for t in (torch.full_like(q, poison), k, v)]
    gates = torch.full_like(routing.gates_BNH, poison).requires_grad_()
    for impl in ("reference", "dense", "gathered", "slots"):
        out = head_attention(*leaves, replace(routing, gates_BNH=gates), causal=True, impl=impl)
        gradients = torch.autograd.grad(out.sum(), [*leaves, gates])
        assert all(t.eq(0).all() for t in (out, *gradients)), impl


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("additive", [True, False])
def test_padding(causal, additive):
    """Padded tokens use as many heads as others; real ones have the outputs and gradients of the text alone."""
    q, k, v, routing = make(12)
    real_T = torch.arange(12) >= 5
    mask = torch.zeros(12).masked_fill(~real_T, -torch.inf) if additive else real_T

    def run(start, **kwargs):
        leaves = [t[:, :, start:].clone().requires_grad_() for t in (q, k, v)]
        part = Routing(routing.gates_BNH[:, start:], routing.selected_BNH[:, start:])
        out = head_attention(*leaves, part, causal=causal, impl="slots", **kwargs)[:, :, -7:]
        return [out, *(g[:, :, -7:] for g in torch.autograd.grad(out.square().sum(), leaves))]

    for padded, alone in zip(run(0, attn_mask=mask), run(5), strict=True):
        torch.testing.assert_close(padded, alone)


def test_compiled_without_a_graph_break_where_the_number_is_promised():
    q, k, v, routing = make()
    leaves = [t.requires_grad_() for t in (q, k, v, routing.gates_BNH.detach())]

    def attend(q, k, v, gates, selected, promised=2):
        value = Routing(gates, selected, heads_per_group=promised, num_groups=2)
        return head_attention(q, k, v, value, causal=True, impl="slots").sin()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*leaves, routing.selected_BNH), attend(*leaves, routing.selected_BNH)
    torch.testing.assert_close(out, expected)
    gradients, wanted = (torch.autograd.grad(o.sum(), leaves) for o in (out, expected))
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want)
    with pytest.raises(Exception, match="must know the number of slots"):
        compiled(*leaves, routing.selected_BNH, promised=None)


def test_nothing_is_read_where_the_number_is_promised():
    """Reading a number out of a fake tensor raises; of a real one it would make a device wait for the host."""

    def attend(count):
        given = replace(routing, heads_per_group=count)
        return slots.attend(q.requires_grad_(), k, v, given, causal=True, scale=1.0, attn_mask=None)

    with FakeTensorMode():
        q, k, v, routing = make(20)
        (gradient,) = torch.autograd.grad(attend(2).sum(), q)
        assert gradient.shape == q.shape
        with pytest.raises(DataDependentOutputException):
            attend(None)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_selection_that_is_not_balanced_is_refused():
    q, k, v, routing = make(promised=False)
    routing.selected_BNH[1, 3] = True
    with pytest.raises(MixheadError, match=r"select between 2 and 3 heads of one key-value group.*balanced router"):
        head_attention(q, k, v, routing, impl="slots")


def test_a_promise_that_is_not_kept_is_found_out_on_the_cpu():
    q, k, v, routing = make(count=2)
    broken = Routing(routing.gates_BNH, routing.selected_BNH, heads_per_group=1, num_groups=2)
    with pytest.raises(MixheadError, match="promises 1 heads in each key-value group, but tokens select 2"):
        head_attention(q, k, v, broken, impl="slots")


# --- the promise, and the choice --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("promise", "kv_heads", "expected"),
    [
        ({}, 2, None),
        ({"heads_per_group": 3}, 1, 3),  # any top-k router, with one key-value head
        ({"heads_per_group": 3}, 2, None),  # 3 of all heads, however they fall
        ({"heads_per_group": 1, "num_groups": 4}, 4, 1),
        ({"heads_per_group": 1, "num_groups": 4}, 2, 2),  # two groups of the router share a key-value head
        ({"heads_per_group": 1, "num_groups": 2}, 4, None),
    ],
)
def test_what_a_promise_means_for_other_groups(promise, kv_heads, expected):
    x = torch.zeros(1, 1, 8)
    assert Routing(x, x.bool(), **promise).slots(kv_heads) == expected


@pytest.fixture
def no_kernel(monkeypatch):
    monkeypatch.setattr(cpu, "refusal", lambda q, mask: "there is no kernel")
    monkeypatch.setattr(cpu, "loaded_level", lambda: None)


def choice(count, tokens=512, mask=None, **kwargs):
    q, k, _, routing = make(tokens, heads=8, kv_heads=2, count=count, **kwargs)
    return explain(q, k, routing, causal=True, attn_mask=mask)


def test_auto_takes_slots_where_they_pay(no_kernel):
    assert choice(1).impl == choice(2).impl == "slots"
    assert "packing heads into slots ran at 1.50 times" in choice(2).reason
    assert choice(2, mask=torch.ones(512, dtype=torch.bool)).impl == "slots"
    assert choice(3).impl != "slots"
    assert choice(2, tokens=64).impl != "slots"
    assert choice(2, promised=False).impl != "slots"
    assert choice(2, mask=torch.ones(8, 1, 512, dtype=torch.bool)).impl != "slots"


def test_auto_computes_what_the_reference_does(no_kernel):
    q, k, v, routing = make(512, heads=4, kv_heads=1, batch=1)
    assert explain(q, k, routing).impl == "slots"
    expected = head_attention(q, k, v, routing, impl="reference")
    torch.testing.assert_close(head_attention(q, k, v, routing), expected)
