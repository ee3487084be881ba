"""`MixtureOfHeadAttention` as a module in somebody's model: self- and cross-attention, caches, compilation, copies."""

import copy
import io

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from mixhead.errors import MixheadError
from mixhead.nn import MixtureOfHeadAttention
from mixhead.ops import IMPLEMENTATIONS

C = 32
LAYERS = {
    "two_stage": {},
    "two_stage, no shared heads": {"shared_heads": 0, "top_k": 3},
    "two_stage, all shared": {"shared_heads": 8, "top_k": 0},
    "query_norm": {"router": "query_norm"},
    "linear": {"router": "linear"},
    "linear, grouped": {"router": "linear", "num_key_value_heads": 2},
    "linear, balanced groups": {"router": "linear", "num_key_value_heads": 2, "group_balanced": True},
    "query_norm, balanced groups": {"router": "query_norm", "num_key_value_heads": 2, "group_balanced": True},
    "two_stage, multi-query": {"num_key_value_heads": 1},
    "own head_dim": {"head_dim": 6},
    "no bias": {"bias": False},
}
ROUTERS = {name: LAYERS[name] for name in ("two_stage", "query_norm", "linear")}

# The others refuse some of these cases; tests/ops has them.
ENGINES = ["auto", *(name for name in IMPLEMENTATIONS if name not in ("slots", "triton", "flex"))]


def make(**kwargs):
    return MixtureOfHeadAttention(C, 8, **{"shared_heads": 2, "top_k": 2, **kwargs})


def plain_attention(layer):
    """PyTorch's own multi-head attention with the same weights."""
    plain = nn.MultiheadAttention(C, 8, batch_first=True)
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    plain.in_proj_weight.data = torch.cat([p.weight.data for p in projections])
    plain.in_proj_bias.data = torch.cat([p.bias.data for p in projections])
    plain.out_proj.load_state_dict(layer.o_proj.state_dict())
    return plain


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("router", ["two_stage", "query_norm", "linear"])
@pytest.mark.parametrize(("shared_heads", "top_k"), [(2, 6), (0, 8)])
def test_with_all_heads_it_is_multi_head_attention(impl, router, shared_heads, top_k):
    layer = make(router=router, shared_heads=shared_heads, top_k=top_k)
    if router == "two_stage":
        layer.router.reset_parameters()  # uniform, so that every gate is 1
    hidden_BNC, other_BTC = torch.randn(2, 9, C), torch.randn(2, 5, C)
    plain = plain_attention(layer)
    torch.testing.assert_close(layer(hidden_BNC, impl=impl), plain(hidden_BNC, hidden_BNC, hidden_BNC)[0])
    torch.testing.assert_close(layer(hidden_BNC, other_BTC, impl=impl), plain(hidden_BNC, other_BTC, other_BTC)[0])
    mask_NN = nn.Transformer.generate_square_subsequent_mask(9)
    expected = plain(hidden_BNC, hidden_BNC, hidden_BNC, attn_mask=mask_NN)[0]
    torch.testing.assert_close(layer(hidden_BNC, causal=True, impl=impl), expected)
    torch.testing.assert_close(layer(hidden_BNC, attn_mask=mask_NN, impl=impl), expected)


@pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS)
def test_the_sum_over_the_heads_of_equation_4(kwargs):
    """y = sum of gate * head * its slice of the output projection, over the selected heads."""
    layer, hidden_BNC = make(**kwargs), torch.randn(2, 5, C)
    output_BNC, routing = layer(hidden_BNC, return_routing=True)
    dim, groups = layer.head_dim, 8 // layer.num_key_value_heads
    expected_BNC = layer.o_proj.bias.expand(2, 5, C)
    for head in range(8):
        rows, kv_rows = slice(head * dim, (head + 1) * dim), slice(head // groups * dim, (head // groups + 1) * dim)
        q, k, v = layer.q_proj(hidden_BNC)[..., rows], layer.k_proj(hidden_BNC)[..., kv_rows], layer.v_proj(hidden_BNC)
        head_BND = (q @ k.mT / dim**0.5).softmax(-1) @ v[..., kv_rows]
        expected_BNC = expected_BNC + routing.gates_BNH[..., head, None] * head_BND @ layer.o_proj.weight[:, rows].mT
    torch.testing.assert_close(output_BNC, expected_BNC, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS)
def test_with_a_cache_as_without(kwargs, impl):
    layer, hidden_BNC = make(**kwargs).eval(), torch.randn(2, 11, C)
    whole_BNC, routing = layer(hidden_BNC, causal=True, return_routing=True, impl=impl)
    cache, position = DynamicCache(), 0
    for length in (4, 1, 3, 1, 1, 1):  # a prompt, then tokens singly and in chunks
        chunk = hidden_BNC[:, position : position + length]
        output, chunk_routing = layer(
            chunk, causal=True, past_key_values=cache, layer_idx=0, return_routing=True, impl=impl
        )
        expected = whole_BNC[:, position : position + length]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        assert chunk_routing.selected_BNH.equal(routing.selected_BNH[:, position : position + length])
        position += length
    assert cache.get_seq_length() == 11


@pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS)
def test_a_left_padded_batch_equals_its_sequences(kwargs):
    layer, hidden_BNC = make(**kwargs).eval(), torch.randn(2, 9, C)
    real_BN = torch.tensor([[True] * 9, [False] * 4 + [True] * 5])
    output_BNC, routing = layer(
        hidden_BNC, causal=True, attn_mask=real_BN[:, None, None], token_mask_BN=real_BN, return_routing=True
    )
    torch.testing.assert_close(output_BNC[:1], layer(hidden_BNC[:1], causal=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output_BNC[1:, 4:], layer(hidden_BNC[1:, 4:], causal=True), rtol=1e-4, atol=1e-5)
    assert output_BNC.isfinite().all()
    # The balance loss is that of the 14 real tokens in one sequence.
    _, packed = layer(hidden_BNC[real_BN].unsqueeze(0), return_routing=True)
    torch.testing.assert_close(routing.balance_loss, packed.balance_loss)


@pytest.mark.parametrize("kwargs", [{}, {"router": "linear", "bias": False}, {"router": "query_norm"}])
def test_projections_of_selected_heads_are_those_of_all_heads(kwargs):
    """At a size where only selected heads are projected. A hook on a projection is called, with all heads."""
    layer = MixtureOfHeadAttention(256, 4, 1, 1, **kwargs)
    hidden_BNC, calls = torch.randn(4, 160, 256, requires_grad=True), []

    def outcome():
        output_BNC = layer(hidden_BNC)
        leaves = [hidden_BNC, *layer.parameters()]
        return [output_BNC, *torch.autograd.grad(output_BNC.square().mean(), leaves, allow_unused=True)]

    sparse = outcome()
    for proj in (layer.q_proj, layer.o_proj):
        proj.register_forward_hook(lambda module, _, output: calls.append(module))
    dense = outcome()
    assert calls == [layer.q_proj, layer.o_proj]
    for a, b in zip(sparse, dense, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS)
def test_gradients_reach_the_projections_and_the_router(kwargs):
    layer, hidden_BNC = make(**kwargs), torch.randn(2, 9, C, requires_grad=True)
    output_BNC, routing = layer(hidden_BNC, return_routing=True)
    (output_BNC.square().sum() + 0.01 * routing.balance_loss).backward()
    for name, tensor in [*layer.named_parameters(), ("hidden_BNC", hidden_BNC)]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        # A bias of the keys moves all scores of a query alike, so its gradient is rounding error.
        assert name == "k_proj.bias" or tensor.grad.abs().sum() > 0, name


def test_cross_attention_from_states_of_another_width():
    layer = make(key_value_size=20, num_key_value_heads=4)
    output_BNC = layer(torch.randn(2, 5, C), torch.randn(2, 7, 20))
    assert output_BNC.shape == (2, 5, C)
    assert layer.k_proj.weight.shape == layer.v_proj.weight.shape == (16, 20)


@pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS)
def test_state_dict_round_trip_through_a_file(kwargs):
    layer, fresh, hidden_BNC = make(**kwargs), make(**kwargs), torch.randn(2, 5, C)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert fresh(hidden_BNC).equal(layer(hidden_BNC))


@pytest.mark.parametrize("kwargs", ROUTERS.values(), ids=ROUTERS)
def test_copies_are_independent(kwargs):
    layer, hidden_BNC = make(**kwargs), torch.randn(2, 5, C)
    before = layer(hidden_BNC)
    twin = copy.deepcopy(layer)
    assert twin(hidden_BNC).equal(before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert layer(hidden_BNC).equal(before)


@pytest.mark.parametrize("kwargs", ROUTERS.values(), ids=ROUTERS)
def test_compile_without_a_graph_break(kwargs):
    layer, hidden_BNC = make(**kwargs), torch.randn(2, 5, C)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def step(module):
        layer.zero_grad()
        output_BNC, routing = module(hidden_BNC, causal=True, return_routing=True)
        (output_BNC.square().sum() + 0.01 * routing.balance_loss).backward()
        return output_BNC.detach(), {name: p.grad.clone() for name, p in layer.named_parameters()}

    (output, gradients), (expected, wanted) = step(compiled), step(layer)
    torch.testing.assert_close(output, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kwargs", ROUTERS.values(), ids=ROUTERS)
def test_checkpointing_changes_nothing(kwargs):
    layer, hidden_BNC = make(**kwargs), torch.randn(2, 5, C, requires_grad=True)

    def gradients(run):
        layer.zero_grad()
        output_BNC, routing = run()
        (output_BNC.square().sum() + 0.01 * routing.balance_loss).backward()
        return [p.grad.clone() for p in layer.parameters()]

    def forward(hidden_BNC):
        return layer(hidden_BNC, return_routing=True)

    plain = gradients(lambda: forward(hidden_BNC))
    checkpointed = gradients(lambda: torch.utils.checkpoint.checkpoint(forward, hidden_BNC, use_reentrant=False))
    for gradient, want in zip(checkpointed, plain, strict=True):
        assert gradient.equal(want)


@pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(kwargs, dtype):
    layer = make(**kwargs).to(dtype)
    output_BNC, routing = layer(torch.randn(2, 5, C, dtype=dtype), return_routing=True)
    assert output_BNC.dtype == dtype
    assert routing.balance_loss.dtype == torch.promote_types(dtype, torch.float32)
    output_BNC.sum().backward()
    assert all(p.grad.dtype == dtype for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS)
def test_autocast(kwargs):
    layer, hidden_BNC = make(**kwargs), torch.randn(2, 5, C)
    exact = layer(hidden_BNC)
    with torch.autocast("cpu", torch.bfloat16):
        output_BNC, routing = layer(hidden_BNC, return_routing=True)
        loss = output_BNC.float().square().sum() + 0.01 * routing.balance_loss
    loss.backward()
    assert output_BNC.dtype == torch.bfloat16
    assert routing.gates_BNH.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
    if layer.router.needs_query:
        return  # its scores come from queries in bfloat16, which may select other heads
    torch.testing.assert_close(output_BNC.float(), exact, rtol=5e-2, atol=5e-2)


def test_shared_heads_of_grouped_attention_spread_over_the_groups_when_balanced():
    layer = make(router="linear", num_key_value_heads=2, group_balanced=True)
    assert layer.router.shared_H.tolist() == [True, False, False, False] * 2
    _, routing = layer(torch.randn(2, 50, C), return_routing=True)
    assert (routing.selected_BNH.unflatten(-1, (2, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"router": "softmax"}, "router='softmax' is unknown: choose one of two_stage, query_norm, linear"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_heads=8"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_heads": 5}, "hidden_size=32 is no multiple of num_heads=5: give head_dim explicitly"),
        ({"shared_heads": 7}, "shared_heads=7 and top_k=2 do not fit into num_heads=8"),
        ({"top_k": 0}, "top_k=0 leaves 6 of 8 heads unused"),
        ({"top_k": 7, "router": "linear"}, "active_heads=9 and num_heads=8 do not fit"),
        (
            {"num_key_value_heads": 2, "group_balanced": True},
            "cannot be group-balanced: choose 'query_norm' or 'linear'",
        ),
        ({"num_key_value_heads": 4, "group_balanced": True, "router": "linear"}, "each of the 4 key-value groups"),
    ],
    ids=str,
)
def test_impossible_layers_are_refused(kwargs, message):
    with pytest.raises(MixheadError, match=message):
        MixtureOfHeadAttention(**{"hidden_size": C, "num_heads": 8, "shared_heads": 2, "top_k": 2, **kwargs})


def test_wrong_calls_are_refused():
    layer = make(key_value_size=20)
    with pytest.raises(MixheadError, match=r"hidden_states must be \[batch, tokens, 32\], got \[5, 32\]"):
        layer(torch.randn(5, C))
    with pytest.raises(MixheadError, match=r"hidden_states must be \[batch, tokens, 32\], got \[2, 5, 20\]"):
        layer(torch.randn(2, 5, 20))
    with pytest.raises(MixheadError, match=r"key_value_states must be \[batch, tokens, 20\], got \[2, 5, 32\]"):
        layer(torch.randn(2, 5, C), torch.randn(2, 5, C))
    with pytest.raises(MixheadError, match="past_key_values goes with self-attention"):
        layer(torch.randn(2, 5, C), torch.randn(2, 5, 20), past_key_values=DynamicCache())
    with pytest.raises(MixheadError, match="impl='fast' is unknown"):
        make()(torch.randn(2, 5, C), impl="fast")
    with pytest.raises(MixheadError, match=r"attn_mask must broadcast to \[2, 8, 5, 5\], got \[2, 5\]"):
        make()(torch.randn(2, 5, C), attn_mask=torch.ones(2, 5, dtype=torch.bool))
