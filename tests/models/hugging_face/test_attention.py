"""The function behind `attn_implementation="mixhead"`: masks, caches, padding, and what it must not compute."""

import copy
import functools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mixhead
from mixhead import MixheadError, MoHConfig
from mixhead.models.hugging_face import RoutingTrace, moh_attention_forward
from mixhead.models.hugging_face.attention import UNSUPPORTED, real_tokens_BN
from mixhead.models.hugging_face.call import ORDINARY, Call, running
from mixhead.models.hugging_face.router_input import RouterInput
from mixhead.recording.listen import keep_routing

TRUE, FALSE = True, False
SMALL = {
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def attention():
    """One attention module with four heads (two key-value heads), of which each token uses two."""
    model = mixhead.convert(LlamaForCausalLM(LlamaConfig(**SMALL)).eval(), MoHConfig(active=0.5, shared=0.0))
    return model.model.layers[0].self_attn


def states(queries=5, keys=5):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, queries, 4, generator=generator)
    k, v = (torch.randn(1, 2, keys, 4, generator=generator) for _ in range(2))
    return q, k, v, torch.randn(1, queries, 16, generator=generator)


def attend(module, q, k, v, hidden, mask=None, call=ORDINARY, **more):
    """As the module's own forward calls it."""
    module.moh_input = RouterInput(hidden)
    with running(call):
        return moh_attention_forward(module, q, k, v, mask, scaling=0.5, **more)[0]


def test_the_empty_places_of_a_static_cache_are_not_seen(attention):
    q, k, v, hidden = states()
    empty = torch.full((1, 2, 3, 4), 1e3)
    with_places = attend(attention, q, torch.cat([k, empty], 2), torch.cat([v, empty], 2), hidden)
    torch.testing.assert_close(with_places, attend(attention, q, k, v, hidden))


def test_a_single_query_sees_the_whole_cache(attention):
    q, k, v, hidden = states()
    every = attend(attention, q, k, v, hidden)
    last = attend(attention, q[:, :, -1:], k, v, hidden[:, -1:])
    torch.testing.assert_close(last, every[:, -1:])


def test_boolean_floating_and_implied_causal_masks_agree(attention):
    q, k, v, hidden = states()
    allowed = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    floating = torch.zeros(1, 1, 5, 5).masked_fill(~allowed, torch.finfo(torch.float32).min)
    implied = attend(attention, q, k, v, hidden)
    torch.testing.assert_close(attend(attention, q, k, v, hidden, allowed), implied)
    torch.testing.assert_close(attend(attention, q, k, v, hidden, floating), implied)


def test_is_causal_of_the_call_wins_over_that_of_the_module(attention):
    q, k, v, hidden = states()
    everything = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    expected = attend(attention, q, k, v, hidden, everything)
    torch.testing.assert_close(attend(attention, q, k, v, hidden, is_causal=False), expected)


@pytest.mark.parametrize("argument", sorted(UNSUPPORTED))
def test_arguments_that_change_the_mathematics_are_refused_not_ignored(attention, argument):
    q, k, v, hidden = states()
    with pytest.raises(MixheadError, match=f"was called with {argument}, which mixture-of-head attention does not"):
        attend(attention, q, k, v, hidden, **{argument: torch.ones(())})


def test_what_the_whole_call_takes_is_not_ignored_where_a_part_is_called():
    model = mixhead.convert(LlamaForCausalLM(LlamaConfig(**SMALL)), MoHConfig(active=0.5))
    with pytest.raises(MixheadError, match="routing_trace goes to the call of the converted model itself"):
        model.model(torch.arange(5).unsqueeze(0), routing_trace=RoutingTrace())


def test_hidden_states_of_other_tokens_than_the_queries_are_refused(attention):
    q, k, v, hidden = states()
    with pytest.raises(MixheadError, match=r"its 1 x 5 queries are not those of its hidden states"):
        attend(attention, q, k, v, hidden[:, 1:])


def test_images_in_one_row_are_routed_one_after_the_other(attention):
    """As in vision towers for images of any size: hidden states [X, C], and a call of the interface for each image."""
    q, k, v, hidden = states()
    whole = attend(attention, q, k, v, hidden, is_causal=False)
    attention.moh_input = RouterInput(hidden[0])
    parts = [(q[:, :, part], k[:, :, part], v[:, :, part]) for part in (slice(2), slice(2, 5))]
    found = [moh_attention_forward(attention, *part, None, scaling=0.5, is_causal=False)[0] for part in parts]
    expected = attend(attention, *parts[1], hidden[:, 2:], is_causal=False)
    torch.testing.assert_close(found[1], expected)
    assert found[0].shape[1] + found[1].shape[1] == whole.shape[1]


@pytest.mark.parametrize("width", [3, 6])
def test_values_of_another_width_than_the_keys(attention, width):
    q, k, _, hidden = states()
    attention.moh_skipped = None
    v = torch.randn(1, 2, 5, width)
    routing = attention.moh_router(hidden, None, None)
    every = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5, enable_gqa=True)
    expected = (every * routing.selected_BNH.transpose(1, 2).unsqueeze(-1)).transpose(1, 2)
    torch.testing.assert_close(attend(attention, q, k, v, hidden), expected)


@pytest.mark.parametrize(
    ("allowed", "real"),
    [
        ([[1, 0, 0], [1, 1, 0], [1, 1, 1]], [1, 1, 1]),  # causal
        ([[0, 0, 0], [0, 1, 0], [0, 1, 1]], [0, 1, 1]),  # padded on the left
        ([[1, 0, 0], [1, 1, 0], [1, 1, 0]], [1, 1, 0]),  # padded on the right: no key, though it sees others
        ([[1, 1, 0], [1, 1, 0], [1, 1, 0]], [1, 1, 0]),  # an encoder
        ([[1, 1, 0]], [1]),  # one query on a cache
        ([[0, 0, 0, 0], [0, 1, 0, 0]], [0, 1]),  # fewer queries than keys
    ],
)
@pytest.mark.parametrize("floating", [TRUE, FALSE])
def test_padding_is_read_off_the_mask(allowed, real, floating):
    mask = torch.tensor(allowed, dtype=torch.bool)[None, None]
    num_queries, num_keys = mask.shape[2:]
    if floating:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert real_tokens_BN(mask, num_queries, num_keys).int().tolist() == [real]


def test_a_bias_in_a_floating_mask_is_no_padding():
    bias = torch.linspace(-50.0, 0.0, 9).reshape(1, 1, 3, 3)
    assert real_tokens_BN(bias, 3, 3).all()


def test_without_a_mask_nothing_is_known_to_be_padding():
    assert real_tokens_BN(None, 3, 3) is None


@torch.no_grad()
def test_a_new_token_gets_the_same_in_one_operator_as_in_several(attention):
    q, k, v, hidden = states(queries=1, keys=40)
    attention.moh_skipped.normal_()
    at_once = attend(attention, q, k, v, hidden)
    torch.testing.assert_close(at_once, attend(attention, q, k, v, hidden, call=Call(impl="reference")))
    torch.testing.assert_close(at_once, attend(attention, q, k, v, hidden, call=Call(RoutingTrace())))


@torch.no_grad()
def test_who_listens_hears_of_a_new_token_too(attention):
    q, k, v, hidden = states(queries=1, keys=40)
    alone = attend(attention, q, k, v, hidden)
    with keep_routing(attention) as log:
        torch.testing.assert_close(attend(attention, q, k, v, hidden), alone)
    assert len(log.layers) == 1


def test_an_attention_module_is_of_its_own_class_again_once_it_is_reverted():
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    of_its_own = type(model.model.layers[0].self_attn)
    converted = mixhead.convert(model, MoHConfig(active=0.5, shared=0.0))
    module = converted.model.layers[0].self_attn
    assert isinstance(module, of_its_own)
    assert type(module).__name__ == "MoHLlamaAttention"
    assert type(mixhead.revert(converted).model.layers[0].self_attn) is of_its_own


def test_a_module_whose_forward_is_its_own_is_fed_too():
    """Offloading replaces the forward of a module, and may do so before the model is converted."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    twin = copy.deepcopy(model)
    for layer in twin.model.layers:
        layer.self_attn.forward = functools.partial(type(layer.self_attn).forward, layer.self_attn)
    ids = torch.arange(5).unsqueeze(0)
    outputs = []
    for each in (model, twin):
        torch.manual_seed(0)
        outputs.append(mixhead.convert(each, MoHConfig(active=0.5, shared=0.0))(ids).logits)
    torch.testing.assert_close(*outputs)
