"""MoH-LLaMA: the official code's results from its weights, and the published folder's layout in a tiny copy."""

import pytest
import torch
from small_llama import TINY, stock_llama, tokens

from mixhead.errors import MixheadError
from mixhead.interop import from_official

TOLERANCE = 1e-5


def largest_difference(a, b) -> float:
    return (a.float() - b.float()).abs().max().item()


# The golden case.


@pytest.fixture
def case(golden):
    return golden("moh_llama_model")


@pytest.fixture
def model(case):
    return from_official("moh_llama", case.entry, case.state_dict)


@torch.no_grad()
def test_golden_logits(model, case):
    assert largest_difference(model(case["input_ids"]).logits, case["logits"]) <= TOLERANCE
    padded = model(case["input_ids"], attention_mask=case["attention_mask"], position_ids=case["position_ids"]).logits
    real = case["attention_mask"].bool()
    assert largest_difference(padded[real], case["padded_logits"][real]) <= TOLERANCE


@pytest.mark.parametrize("use_cache", [True, False])
def test_golden_generation(model, case, use_cache):
    prompt = case["input_ids"][:, :6]
    settings = {"max_new_tokens": 10, "do_sample": False, "use_cache": use_cache}
    assert torch.equal(model.generate(prompt, **settings), case["greedy"])
    padding = torch.zeros(2, 3, dtype=prompt.dtype)
    padded = torch.cat([padding, prompt], 1)
    mask = torch.cat([padding, torch.ones_like(prompt)], 1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 3:], case["greedy"])


def test_flat_configuration_and_published_rule(model, case):
    flat = {**case.config, "shared_heads": case.entry["shared_heads"], "top_k": case.entry["top_k"]}
    expected = model(case["input_ids"]).logits
    for config in (flat, case.config, {"config": case.config}):  # half shared, a quarter routed is the published rule
        other = from_official("moh_llama", config, case.state_dict)
        assert torch.equal(other(case["input_ids"]).logits, expected)
        assert other.config.moh["layers"] == [{"num_heads": 8, "active_heads": 6, "shared_heads": 4}] * 3


def test_every_weight_learns_and_balance_joins_the_loss(model, case):
    ids = case["input_ids"]
    plain = model(ids, labels=ids).loss
    loss = model.train()(ids, labels=ids).loss
    assert loss > plain
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


def test_weights_are_copied(model, case):
    weights = case.state_dict
    model = from_official("moh_llama", case.entry, weights)
    before = model(case["input_ids"]).logits
    for tensor in weights.values():
        tensor.zero_()
    assert torch.equal(model(case["input_ids"]).logits, before)


# Against stock LLaMA.


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope_scaling", [None, {"type": "linear", "factor": 2.0}])
def test_all_heads_active_gives_stock_bits(tied, rope_scaling):
    changes = {"tie_word_embeddings": tied, "rope_theta": 5000.0}
    if rope_scaling is not None:
        changes["rope_scaling"] = rope_scaling
    stock = stock_llama(**changes)
    weights = {**stock.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    config = {**TINY, **changes, "shared_heads": 3, "top_k": 5}
    ours = from_official("moh_llama", config, weights)
    assert torch.equal(ours(tokens()).logits, stock(tokens()).logits)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied
    assert ours.config.rope_parameters["rope_theta"] == 5000.0
    routed = from_official("moh_llama", {**TINY, **changes}, weights)
    assert not torch.allclose(routed(tokens()).logits, stock(tokens()).logits, atol=1e-3)


def test_embeddings_are_tied_where_no_head_is_given():
    stock = stock_llama(tie_word_embeddings=True)
    weights = {name: tensor for name, tensor in stock.state_dict().items() if name != "lm_head.weight"}
    ours = from_official("moh_llama", {**TINY, "shared_heads": 8, "top_k": 0}, weights)
    assert torch.equal(ours(tokens()).logits, stock(tokens()).logits)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_dtype_of_the_weights_is_kept():
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in stock_llama().state_dict().items()}
    model = from_official("moh_llama", TINY, weights)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16
    assert model(tokens()).logits.isfinite().all()


def change_shape(weights):
    weights["model.norm.weight"] = torch.ones(31)


def untie(weights):
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1


@pytest.mark.parametrize(
    ("changes", "damage", "sentence"),
    [
        ({}, lambda w: w.pop("model.norm.weight"), "missing model.norm.weight"),
        ({}, lambda w: w.update({"model.layers.0.self_attn.wg.weight": torch.ones(4, 32)}), "unexpected .*wg.weight"),
        ({}, change_shape, r"must be \[32\], but it is \[31\]"),
        ({}, lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "floating"),
        ({}, lambda w: w.update({"model.norm.weight": [1.0]}), "must be a tensor"),
        ({"tie_word_embeddings": True}, untie, "tie_word_embeddings"),
        ({"tie_word_embeddings": False}, lambda w: w.pop("lm_head.weight"), "missing lm_head.weight"),
        ({"num_hidden_layers": 10**12}, None, "weights of 2 layers"),
        ({"num_hidden_layers": 0}, None, "whole number"),
        ({"hidden_size": "32"}, None, "whole number"),
        ({"vocab_size": None}, None, "does not say vocab_size"),
        ({"num_key_value_heads": 3}, None, "must divide"),
        ({"num_attention_heads": 6}, None, "must be a multiple of num_attention_heads=6"),
        ({"hidden_act": "square-root"}, None, "describes no LLaMA model"),
        ({"shared_heads": 6, "top_k": 3}, None, "at most num_attention_heads=8"),
        ({"shared_heads": 0, "top_k": 0}, None, "at least 1"),
        ({"top_k": 1.5}, None, "whole numbers"),
        ({"model_type": "mistral"}, None, "'mistral'"),
        ({"quantization_config": {"bits": 4}}, None, "quantised"),
        ({"rotary_percent": 0.5}, None, "rotary_percent"),
    ],
)
def test_what_does_not_fit_is_refused(changes, damage, sentence):
    weights = stock_llama().state_dict()
    if damage is not None:
        damage(weights)
    with pytest.raises(MixheadError, match=sentence):
        from_official("moh_llama", {**TINY, "num_key_value_heads": 2, **changes}, weights)
