"""With all heads active a converted model is the original, bit by bit; and `revert` gives the original back."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM
from zoo import EVERY, ZOO, answer, same_bits

import mixhead
from mixhead import MixheadError, MoHConfig


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("name", ZOO)
def test_with_all_heads_active_the_output_is_that_of_the_original_bit_by_bit(name):
    model = ZOO[name].make()
    before = answer(ZOO[name], model)
    assert mixhead.convert(model, MoHConfig(active=1.0)) is model
    assert same_bits(answer(ZOO[name], model), before)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "clip", "whisper"])
def test_the_bits_stay_whichever_attention_the_original_ran(name, attention):
    model = ZOO[name].make()
    model.set_attn_implementation(attention)
    before = answer(ZOO[name], model)
    mixhead.convert(model, MoHConfig(active=1.0))
    assert same_bits(answer(ZOO[name], model), before)
    mixhead.revert(model)
    assert model.config._attn_implementation == attention
    assert same_bits(answer(ZOO[name], model), before)


@pytest.mark.parametrize(("name", "router"), EVERY)
def test_revert_gives_back_the_original(name, router):
    model = ZOO[name].make()
    original = copy.deepcopy(model)
    before = answer(ZOO[name], original)

    mixhead.convert(model, MoHConfig(active=0.5, shared=0.25, router=router))
    answer(ZOO[name], model)
    assert mixhead.revert(model) is model

    assert type(model) is type(original)
    assert type(model.config) is type(original.config)
    assert model.config.to_dict() == original.config.to_dict()
    assert model.config._attn_implementation == original.config._attn_implementation
    assert hooks(model) == hooks(original)
    assert not [n for n, m in model.named_modules() if any(attribute.startswith("moh_") for attribute in vars(m))]
    expected, found = bits(original), bits(model)
    assert expected.keys() == found.keys()
    assert all(same_bits(found[key], expected[key]) for key in expected)
    assert same_bits(answer(ZOO[name], model), before)


def test_a_reverted_model_converts_again_to_the_same():
    model = ZOO["llama"].make()
    config = MoHConfig(active=0.5, shared=0.25, router="query_norm")
    first = answer(ZOO["llama"], mixhead.convert(model, config))
    again = answer(ZOO["llama"], mixhead.convert(mixhead.revert(model), config))
    assert same_bits(first, again)


def test_the_parts_of_a_model_keep_their_different_attentions():
    model = ZOO["clip"].make()
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    before = answer(ZOO["clip"], model)
    mixhead.convert(model, MoHConfig(active=1.0))
    assert same_bits(answer(ZOO["clip"], model), before)
    mixhead.revert(model)
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_a_copy_routes_and_reverts_without_touching_the_model_it_was_made_from():
    model = mixhead.convert(ZOO["llama"].make(), MoHConfig(active=0.5))
    before = answer(ZOO["llama"], model)
    copied = copy.deepcopy(model)
    assert same_bits(answer(ZOO["llama"], copied), before)
    mixhead.revert(copied)
    assert hooks(copied) == 0
    assert same_bits(answer(ZOO["llama"], model), before)
    assert same_bits(answer(ZOO["llama"], copied), answer(ZOO["llama"], ZOO["llama"].make()))


def test_other_hooks_of_the_user_survive():
    model = ZOO["llama"].make()
    seen = []
    attention = model.model.layers[0].self_attn
    handle = attention.register_forward_pre_hook(lambda *_: seen.append(1))
    mixhead.revert(mixhead.convert(model, MoHConfig(active=0.5)))
    answer(ZOO["llama"], model)
    assert seen
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_kept(dtype):
    model = ZOO["llama"].make().to(dtype)
    before = answer(ZOO["llama"], model)
    mixhead.convert(model, MoHConfig(active=1.0))
    assert same_bits(answer(ZOO["llama"], model), before)
    mixhead.revert(model)
    mixhead.convert(model, MoHConfig(active=0.5))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert answer(ZOO["llama"], model).dtype == dtype


def test_no_other_attention_may_run_all_heads_behind_the_routers_back():
    model = mixhead.convert(ZOO["llama"].make(), MoHConfig(active=0.5))
    with pytest.raises(MixheadError, match=r"every token would use all heads\. Call mixhead\.revert"):
        model.set_attn_implementation("sdpa")


def test_a_second_model_of_the_same_configuration_is_left_as_it_is():
    config = ZOO["llama"].make().config
    kind, before = type(config), config.to_dict()
    first, second = (LlamaForCausalLM(config).eval() for _ in range(2))
    expected = answer(ZOO["llama"], second)

    mixhead.convert(first, MoHConfig(active=0.5))
    assert second.config is config and type(config) is kind and config.to_dict() == before
    assert config._attn_implementation == "sdpa"
    assert same_bits(answer(ZOO["llama"], second), expected)
    assert {id(module.config) for module in first.modules() if hasattr(module, "config")} == {id(first.config)}

    mixhead.convert(second, MoHConfig(active=0.75))
    assert first.config.moh["layers"][0]["active_heads"] == 2
    assert second.config.moh["layers"][0]["active_heads"] == 3
    mixhead.revert(first)
    assert type(first.config) is kind and first.config.to_dict() == before
    assert second.config.moh["layers"][0]["active_heads"] == 3


@pytest.mark.parametrize("name", ["clip", "whisper"])
def test_a_teacher_stays_dense_where_its_student_was_built_from_its_configuration(name):
    teacher = ZOO[name].make()
    student = type(teacher)(teacher.config).eval()
    before = answer(ZOO[name], teacher)
    mixhead.convert(student, MoHConfig(active=0.5))
    assert same_bits(answer(ZOO[name], teacher), before)
    assert not hasattr(teacher.config, "moh")
    parts = [teacher.config, *(getattr(teacher.config, key) for key in teacher.config.sub_configs)]
    assert {part._attn_implementation for part in parts} == {"sdpa"}
    mixhead.revert(student)
    assert student.config.to_dict() == teacher.config.to_dict()


def test_a_model_of_the_configuration_of_a_converted_one_survives_its_return():
    first = mixhead.convert(ZOO["llama"].make(), MoHConfig(active=0.5))
    second = type(first)(first.config).eval()
    before = answer(ZOO["llama"], second)
    mixhead.revert(first)
    assert same_bits(answer(ZOO["llama"], second), before)
    assert second.config.moh["layers"][0]["active_heads"] == 2
