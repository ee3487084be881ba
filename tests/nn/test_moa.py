"""`MixtureOfAttentionHeads` as a module in somebody's model: equations, caches, padding, compilation, dtypes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, StaticCache
from transformers.models.llama import LlamaConfig

from mixhead.errors import MixheadError
from mixhead.nn import MixtureOfAttentionHeads
from mixhead.ops import IMPLEMENTATIONS
from mixhead.routing import LossWeights

C = 32
LAYERS = {
    "MoA": {},
    "all experts": {"top_k": 5},
    "one expert": {"top_k": 1},
    "several heads an expert": {"num_key_value_heads": 3},
    "wide heads": {"head_dim": 32, "num_key_value_heads": 2},
    "renormalised": {"normalisation": "renormalised"},
    "JetMoE's gates": {"normalisation": "top_k_softmax"},
}
ENGINES = ["auto", *(name for name in IMPLEMENTATIONS if name not in ("slots", "triton", "flex"))]


def make(**kwargs):
    layer = MixtureOfAttentionHeads(C, **{"num_experts": 5, "top_k": 2, "head_dim": 8, **kwargs})
    torch.nn.init.normal_(layer.router.gate_proj.weight)
    return layer.eval()


def by_hand(layer, query_BNC, key_value_BTC, allowed_NT=None):
    """y_t = sum over the chosen experts of gate * head * its output projection, expert by expert."""
    routing = layer.router(query_BNC)
    k_BKTD, v_BKTD = layer.project_keys_and_values(key_value_BTC)
    y_BNC = torch.zeros_like(query_BNC)
    for expert in range(layer.num_experts):
        q_BKND = (query_BNC @ layer.q_experts[expert]).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
        out_BKND = F.scaled_dot_product_attention(q_BKND, k_BKTD, v_BKTD, attn_mask=allowed_NT)
        gate_BN1 = routing.gates_BNH[..., expert, None]
        y_BNC = y_BNC + gate_BN1 * (out_BKND.transpose(1, 2).flatten(2) @ layer.o_experts[expert])
    return y_BNC


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS)
def test_the_sum_over_the_experts(kwargs, impl):
    layer, query, other = make(**kwargs), torch.randn(2, 9, C), torch.randn(2, 6, C)
    torch.testing.assert_close(layer(query, impl=impl)[0], by_hand(layer, query, query), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(query, other, impl=impl)[0], by_hand(layer, query, other), rtol=1e-4, atol=1e-5)
    causal = by_hand(layer, query, query, torch.ones(9, 9, dtype=torch.bool).tril())
    torch.testing.assert_close(layer(query, causal=True, impl=impl)[0], causal, rtol=1e-4, atol=1e-5)


def test_identical_experts_are_multi_query_attention_times_the_gates():
    layer, query = make(top_k=5, normalisation="renormalised"), torch.randn(2, 9, C)
    with torch.no_grad():
        layer.q_experts.copy_(layer.q_experts[:1].expand_as(layer.q_experts))
        layer.o_experts.copy_(layer.o_experts[:1].expand_as(layer.o_experts))
    k_BKTD, v_BKTD = layer.project_keys_and_values(query)
    expected = F.scaled_dot_product_attention((query @ layer.q_experts[0]).unsqueeze(1), k_BKTD, v_BKTD)
    torch.testing.assert_close(layer(query)[0], expected.squeeze(1) @ layer.o_experts[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS)
def test_with_a_cache_as_without(kwargs):
    layer, query = make(**kwargs), torch.randn(2, 11, C)
    whole_BNC, routing = layer(query, causal=True)
    cache, position = DynamicCache(), 0
    for length in (4, 1, 3, 1, 1, 1):  # a prompt, then tokens singly and in chunks
        chunk = slice(position, position + length)
        output_BNC, of_chunk = layer(query[:, chunk], causal=True, past_key_values=cache)
        torch.testing.assert_close(output_BNC, whole_BNC[:, chunk], rtol=1e-4, atol=1e-5)
        assert of_chunk.expert_BNS.equal(routing.expert_BNS[:, chunk])
        position += length
    # One key and one value head for all experts.
    assert cache.layers[0].keys.shape == (2, layer.num_key_value_heads, 11, layer.head_dim)


def test_a_static_cache_takes_a_mask():
    layer, query = make(), torch.randn(2, 6, C)
    cache = StaticCache(LlamaConfig(num_hidden_layers=1), max_cache_len=16)
    whole_BNC, _ = layer(query, causal=True)
    for position in range(6):
        seen_NT = (torch.arange(16) <= position).unsqueeze(0)
        output_BNC, _ = layer(query[:, position : position + 1], attn_mask=seen_NT, past_key_values=cache)
        torch.testing.assert_close(output_BNC[:, 0], whole_BNC[:, position], rtol=1e-4, atol=1e-5)


def test_keys_and_values_of_cross_attention_can_be_kept():
    layer, query, other = make(key_value_size=20), torch.randn(2, 4, C), torch.randn(2, 7, 20)
    kept = layer.project_keys_and_values(other)
    assert layer(query, keys_and_values=kept)[0].equal(layer(query, other)[0])


@pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS)
def test_a_padded_batch_equals_its_sequences(kwargs):
    layer, query = make(**kwargs), torch.randn(2, 9, C)
    padding = torch.tensor([[False] * 9, [True] * 4 + [False] * 5])
    output_BNC, _ = layer(query, None, padding, padding, causal=True)
    torch.testing.assert_close(output_BNC[:1], layer(query[:1], causal=True)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output_BNC[1:, 4:], layer(query[1:, 4:], causal=True)[0], rtol=1e-4, atol=1e-5)
    assert not output_BNC[padding].any()


def test_rotary_embedding_makes_scores_depend_on_distances():
    layer, query = make(num_key_value_heads=2), torch.randn(1, 6, C)
    angles_ND = torch.arange(12.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03]).repeat(2)

    def at(start):
        angles = angles_ND[None, start : start + 6]
        return layer(query, causal=True, position_embeddings=(angles.cos(), angles.sin()))[0]

    torch.testing.assert_close(at(0), at(5), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(at(0), layer(query, causal=True)[0], atol=1e-3)


def test_dropout_in_training_keeps_the_mean():
    layer, query = make(dropout=0.3, num_key_value_heads=2), torch.randn(1, 5, C)
    whole = layer(query, causal=True)[0]
    layer.train()
    outputs = torch.stack([layer(query, causal=True)[0] for _ in range(400)])
    assert outputs.std(0).max() > 0
    torch.testing.assert_close(outputs.mean(0), whole, rtol=0, atol=6 * (outputs.std(0) / 20).max().item())


@pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS)
def test_gradients_reach_every_parameter(kwargs):
    layer, query = make(**kwargs).train(), torch.randn(2, 30, C, requires_grad=True)
    output_BNC, routing = layer(query)
    (output_BNC.square().sum() + routing.aux_loss).backward()
    assert query.grad.abs().sum() > 0
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradcheck_of_the_layer():
    layer = make(head_dim=3, num_key_value_heads=2).double()
    query, other = (torch.randn(1, n, C, dtype=torch.float64, requires_grad=True) for n in (3, 4))
    padding = torch.tensor([[False, True, False]])
    assert torch.autograd.gradcheck(lambda q, o: layer(q, o, padding)[0], (query, other), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    layer, query = make(head_dim=32), torch.randn(2, 9, C)
    expected = layer(query, causal=True)[0]
    output = copy.deepcopy(layer).to(dtype)(query.to(dtype), causal=True)[0]
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=1e-4 if dtype == torch.float64 else 0.3)


@pytest.mark.parametrize("train", [False, True])
def test_compiles_to_one_graph(train):
    layer = make(num_key_value_heads=2, head_dim=16, noisy=True).train(False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    query = torch.randn(2, 9, C, requires_grad=train)
    padding = torch.tensor([[False] * 9, [False] * 7 + [True] * 2])
    outcomes = []
    for run in (layer, compiled):
        output_BNC, routing = run(query, None, padding, padding, causal=True)
        loss = output_BNC.square().sum() + routing.aux_loss
        gradients = torch.autograd.grad(loss, [query, *layer.parameters()], allow_unused=True) if train else []
        outcomes.append([output_BNC.detach(), *(g for g in gradients if g is not None)])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_loss_weights_reach_the_routing():
    layer = make(loss_weights=LossWeights(switch=0.0, z=0.5, cv=0.0))
    routing = layer(torch.randn(1, 4, C))[1]
    torch.testing.assert_close(routing.aux_loss, 0.5 * routing.z_loss)


def test_the_output_alone():
    assert isinstance(make()(torch.randn(1, 3, C), return_routing=False), torch.Tensor)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"top_k": 6}, "top_k=6 must be at least 1 and at most num_experts=5"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1"),
    ],
)
def test_impossible_layers_are_refused(kwargs, message):
    with pytest.raises(MixheadError, match=message):
        make(**kwargs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": torch.randn(2, 3, 7)}, r"query must be \[batch, tokens, 32\], got \[2, 3, 7\]"),
        ({"key_value": torch.randn(2, 3, 7)}, r"key_value must be \[batch, tokens, 32\], got \[2, 3, 7\]"),
        ({"query_padding_mask": torch.zeros(2, 3)}, r"query_padding_mask must be torch.bool of shape \[2, 3\]"),
        ({"key_padding_mask": torch.zeros(2, 4).bool()}, r"key_padding_mask must be torch.bool of shape \[2, 3\]"),
        ({"key_value": torch.randn(2, 3, C), "past_key_values": DynamicCache()}, "exclude each other"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(MixheadError, match=message):
        make()(**{"query": torch.randn(2, 3, C), **arguments})
