"""JetMoE: the model of transformers and the converted one compute the same, and the converted one can do more."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, JetMoeConfig, JetMoeForCausalLM, StaticCache

import mixhead
from mixhead.errors import MixheadError
from mixhead.models.jetmoe import SlotAttention

CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "kv_channels": 16,
    "intermediate_size": 24,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLOSE = {"rtol": 0, "atol": 1e-5}


def make(**changes):
    torch.manual_seed(3)
    return JetMoeForCausalLM(JetMoeConfig(**{**CONFIG, **changes})).eval()


def pair(**changes):
    """The model of transformers, and a converted copy of it."""
    model = make(**changes)
    return model, mixhead.convert(copy.deepcopy(model))


def tokens(batch=2, length=9):
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("changes", [{}, {"num_experts_per_tok": 1}, {"num_experts_per_tok": 4}, {"kv_channels": 32}])
def test_equal_logits_and_gradients(changes, attention):
    outcomes = []
    model = make(**changes, attn_implementation=attention)
    for variant in (model, mixhead.convert(copy.deepcopy(model))):
        out = variant(tokens(), labels=tokens(), output_router_logits=True)
        out.loss.backward()
        outcomes.append([out.logits, out.loss, *out.router_logits, *(p.grad for p in variant.parameters())])
    assert len(outcomes[0]) == len(outcomes[1])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_padded_batch():
    model, converted = pair()
    mask_BN = torch.ones(2, 9, dtype=torch.int64)
    mask_BN[1, :4] = 0
    theirs, ours = (m(tokens(), attention_mask=mask_BN).logits for m in (model, converted))
    torch.testing.assert_close(ours[mask_BN.bool()], theirs[mask_BN.bool()], **CLOSE)


def test_generation_with_and_without_a_cache():
    model, converted = pair()
    expected = model.generate(tokens(), max_new_tokens=8, do_sample=False)
    for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert converted.generate(tokens(), max_new_tokens=8, do_sample=False, **settings).equal(expected)
    beams = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    assert converted.generate(tokens(), **beams).equal(model.generate(tokens(), **beams))


def test_a_static_cache_that_is_longer_than_the_prompt():
    _, converted = pair()
    cache = StaticCache(converted.config, max_cache_len=32)
    whole = converted(tokens()).logits
    torch.testing.assert_close(converted(tokens()[:, :5], cache=cache).logits, whole[:, :5], **CLOSE)
    torch.testing.assert_close(converted(tokens()[:, 5:], cache=cache).logits, whole[:, 5:], **CLOSE)


def test_gradient_checkpointing_which_transformers_refuses():
    model, converted = pair()
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        model.gradient_checkpointing_enable()
    checkpointed = mixhead.convert(copy.deepcopy(model)).train()
    checkpointed.gradient_checkpointing_enable()
    for variant in (converted.train(), checkpointed):
        variant(tokens(), labels=tokens()).loss.backward()
    for (name, a), b in zip(converted.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_compiles_to_one_graph():
    model, converted = pair(num_hidden_layers=1)
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    for variant in (model, compiled):
        variant(tokens(), labels=tokens()).loss.backward()
    torch.testing.assert_close(compiled(tokens()).logits, model(tokens()).logits, **CLOSE)
    for (name, a), b in zip(model.named_parameters(), converted.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_attention_dropout_in_training():
    _, converted = pair(attention_dropout=0.5)
    assert converted(tokens()).logits.equal(converted(tokens()).logits)
    converted.train()
    assert not converted(tokens()).logits.equal(converted(tokens()).logits)


def test_what_is_saved_is_a_plain_jetmoe(tmp_path):
    model, converted = pair()
    converted.save_pretrained(tmp_path / "saved")
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), mixhead.load(tmp_path / "saved")):
        assert type(loaded) is JetMoeForCausalLM
        assert loaded(tokens()).logits.equal(model(tokens()).logits)
        torch.testing.assert_close(mixhead.convert(loaded)(tokens()).logits, model(tokens()).logits, **CLOSE)


def test_revert_gives_the_same_bits_again():
    model, converted = pair()
    assert sum(isinstance(m, SlotAttention) for m in converted.modules()) == 2
    reverted = mixhead.revert(converted)
    assert [type(m) for m in reverted.modules()] == [type(m) for m in model.modules()]
    assert reverted(tokens()).logits.equal(model(tokens()).logits)
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        reverted.gradient_checkpointing_enable()
    with pytest.raises(MixheadError, match="nothing to revert"):
        mixhead.revert(reverted)


def test_record_routing_tells_the_experts_of_each_token():
    _, converted = pair()
    mask_BN = torch.ones(2, 9, dtype=torch.int64)
    mask_BN[1, :4] = 0
    with mixhead.record_routing(converted) as log:
        converted(tokens(), attention_mask=mask_BN)
    load = log.load()
    assert [*load] == ["model.layers.0.self_attention", "model.layers.1.self_attention"]
    for load_E in load.values():
        assert load_E.shape == (4,)
        assert load_E.sum().item() == pytest.approx(2.0)


def test_bfloat16():
    model, converted = (m.bfloat16() for m in pair())
    torch.testing.assert_close(converted(tokens()).logits, model(tokens()).logits, rtol=0, atol=0.1)


def test_refusals():
    model, converted = pair()
    with pytest.raises(MixheadError, match="convert it without a MoHConfig"):
        mixhead.convert(model, mixhead.MoHConfig())
    with pytest.raises(MixheadError, match="converted already"):
        mixhead.convert(converted)
