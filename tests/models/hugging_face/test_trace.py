"""`keep_routing`: exact counts, whatever runs around the model, and nothing left behind."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import mixhead
from mixhead import MoHConfig


def make(**config):
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    return mixhead.convert(LlamaForCausalLM(sizes).eval(), MoHConfig(**{"active": 0.5, "shared": 0.25, **config}))


def ids(batch=2, length=5):
    return torch.randint(1, 16, (batch, length), generator=torch.Generator().manual_seed(0))


LAYERS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_loads_are_exact_counts():
    model = make()
    with mixhead.keep_routing(model) as log:
        model(ids())
        model(ids(batch=1, length=3))
    routings = [routing for name, routing in log.layers if name == LAYERS[0]]
    assert [tuple(routing.selected_BNH.shape) for routing in routings] == [(2, 5, 4), (1, 3, 4)]
    used = sum(routing.selected_BNH.sum((0, 1)) for routing in routings)
    assert torch.equal(log.load()[LAYERS[0]], used / 13)
    assert log.load()[LAYERS[0]][0] == 1.0  # the shared head


def test_padding_is_left_out_of_the_loads():
    model = make()
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    with mixhead.keep_routing(model) as log:
        model(ids(), attention_mask=mask)
    for name, routing in log.layers:
        assert torch.equal(log.load()[name], routing.selected_BNH[mask.bool()].float().sum(0) / 7)


def test_nothing_is_left_behind_and_nothing_is_recorded_afterwards():
    model = make()
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    with pytest.raises(KeyboardInterrupt), mixhead.keep_routing(model) as log:
        raise KeyboardInterrupt
    model(ids())
    assert log.layers == []
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks


def test_recording_does_not_change_the_training_loss():
    model = make(balance_coefficient=1.0).train()
    plain = model(input_ids=ids(), labels=ids()).loss
    with mixhead.keep_routing(model) as log:
        recorded = model(input_ids=ids(), labels=ids()).loss
    assert torch.equal(plain, recorded)
    assert recorded > make().eval()(input_ids=ids(), labels=ids()).loss
    assert len(log.layers) == 2


def test_what_checkpointing_computes_again_is_recorded_once():
    model = make().train()
    model.gradient_checkpointing_enable()
    with mixhead.keep_routing(model) as log:
        model(input_ids=ids(), labels=ids()).loss.backward()
    assert [name for name, _ in log.layers] == LAYERS


def test_recorded_values_hold_no_graph():
    model = make().train()
    with mixhead.keep_routing(model) as log:
        model(input_ids=ids(), labels=ids())
    assert not any(routing.gates_BNH.requires_grad for _, routing in log.layers)


def test_two_recordings_at_once():
    model = make()
    with mixhead.keep_routing(model) as outer, mixhead.keep_routing(model) as inner:
        model(ids())
    assert [name for name, _ in outer.layers] == [name for name, _ in inner.layers] == LAYERS


def test_a_part_of_the_model_and_a_wrapper_around_it():
    model = make()
    wrapper = torch.nn.Sequential(model)
    with mixhead.keep_routing(wrapper) as log:
        wrapper(ids())
        model.model(ids())
    assert [name for name, _ in log.layers] == LAYERS * 2


def test_a_compiled_model():
    torch._dynamo.reset()
    model = make()
    compiled = torch.compile(model, backend="eager")
    compiled(ids())
    with mixhead.keep_routing(compiled) as log:
        compiled(ids())
    with mixhead.keep_routing(model) as expected:
        model(ids())
    assert [name for name, _ in log.layers] == LAYERS
    for name in LAYERS:
        assert torch.equal(log.selected(name), expected.selected(name))


def test_a_dense_model_has_nothing_to_record():
    model = mixhead.revert(make())
    with mixhead.keep_routing(model) as log:
        model(ids())
    assert log.load() == {}


def test_a_model_whose_cache_has_no_positions_is_left_alone():
    model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=4)).eval()
    with mixhead.keep_routing(model) as log:
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert log.load() == {}
