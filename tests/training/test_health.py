"""What the log of a training run says of the routing: the columns have the model's own numbers."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mixhead
from mixhead.models.hugging_face import RoutingTrace
from mixhead.recording.listen import routers_by_layer
from mixhead.training.health import HEALTH, layer_columns, routing_health


def converted(heads_by_layer):
    """A Llama of four heads; a layer that uses all of them has no router."""
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=len(heads_by_layer),
        num_attention_heads=4,
    )
    return mixhead.convert(LlamaForCausalLM(config), mixhead.MoHConfig(active_heads=heads_by_layer))


def health_of(model, columns):
    trace = RoutingTrace()
    model(input_ids=torch.arange(12)[None] % 17, routing_trace=trace)
    return [name for name, _ in trace.layers], routing_health([routing for _, routing in trace.layers], columns)


def test_layers_are_numbered_as_in_the_model():
    model = converted([4, 2, 4, 2, 2])
    columns = layer_columns(model)
    assert columns == ("load_entropy_1", "load_entropy_3", "load_entropy_4")
    layers, health = health_of(model, columns)
    assert layers == [*routers_by_layer(model)]
    assert [*health] == [*HEALTH, *columns]


def test_peft_which_copies_routers_to_train_them_adds_no_columns():
    peft = pytest.importorskip("peft")
    model = converted([4, 2, 2])
    layers = [*routers_by_layer(model)]
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["moh_router"])
    wrapped = peft.get_peft_model(model, lora)
    assert [*routers_by_layer(wrapped)] == layers
    assert all(any(p.requires_grad for p in router.parameters()) for router in routers_by_layer(wrapped).values())
    columns = layer_columns(wrapped)
    assert columns == ("load_entropy_1", "load_entropy_2")
    assert [*health_of(wrapped, columns)[1]] == [*HEALTH, *columns]


def test_a_wrapped_model_can_be_recorded_and_is_named_as_before():
    peft = pytest.importorskip("peft")
    model = converted([4, 2, 2])
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["moh_router"])
    wrapped = peft.get_peft_model(model, lora)
    with mixhead.recording.keep_routing(wrapped) as log:
        wrapped(input_ids=torch.arange(12)[None])
    assert [name for name, _ in log.layers] == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
