"""The MoA encoder-decoder and the MoA encoder as models of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import mixhead  # noqa: F401  # makes the models known to transformers
from mixhead.bench.compute import forward_macs
from mixhead.errors import MixheadError
from mixhead.models.moa import (
    NAMED,
    MoAEncoderConfig,
    MoAForMaskedLM,
    MoATransformerConfig,
    MoATransformerForConditionalGeneration,
)
from mixhead.models.moa.attention import DenseAttention, ExpertAttention
from mixhead.models.moa.layers import rotary
from mixhead.models.moa.modeling import IGNORED

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_heads": 5,
    "active_heads": 2,
    "head_dim": 8,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
PAIRED = {**SIZES, "num_key_value_heads": 2}
DENSE = {**SIZES, "num_heads": 3, "active_heads": None}
KINDS = pytest.mark.parametrize("sizes", [SIZES, PAIRED, DENSE], ids=["moa", "two heads an expert", "dense"])


def seq2seq(**changes: object) -> MoATransformerForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {**SIZES, "encoder_layers": 2, "decoder_layers": 2, **changes}
    return with_choices(MoATransformerForConditionalGeneration(MoATransformerConfig(**sizes)).eval())


def with_choices(model: Any) -> Any:
    """Routers start at 0, where all tokens choose alike."""
    for module in model.modules():
        if isinstance(module, ExpertAttention):
            torch.nn.init.normal_(module.experts.router.gate_proj.weight)
    return model


def batch() -> dict[str, torch.Tensor]:
    """Two sentences, of which the second is shorter on both sides."""
    torch.manual_seed(1)
    ids, labels = torch.randint(4, 40, (2, 7)), torch.randint(4, 40, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, 4:], ids[1, 4:], labels[1, 3:] = 0, 0, IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@KINDS
def test_decoding_step_by_step_gives_the_same_scores(sizes: dict[str, object]) -> None:
    model, inputs = seq2seq(**sizes), batch()
    whole = model(**inputs).logits
    target = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    source = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    cache, steps = None, []
    for ids in (target[:, :2], target[:, 2:3], target[:, 3:]):
        output = model(**source, decoder_input_ids=ids, cache=cache, use_cache=True)
        cache = output.cache
        steps.append(output.logits)
    real = inputs["labels"] != IGNORED
    torch.testing.assert_close(torch.cat(steps, 1)[real], whole[real], rtol=1e-4, atol=1e-5)


@KINDS
def test_padding_changes_nothing(sizes: dict[str, object]) -> None:
    model, inputs = seq2seq(**sizes), batch()
    padded = model(**inputs, output_routing=True)
    alone = model(inputs["input_ids"][1:, :4], labels=inputs["labels"][1:, :3], output_routing=True)
    torch.testing.assert_close(padded.logits[1:, :3], alone.logits, rtol=1e-4, atol=1e-5)
    for routing in padded.routing:
        mask_BN = routing.token_mask_BN
        assert mask_BN is not None
        assert not routing.selected_BNH[~mask_BN].any() and (routing.selected_BNH.sum(-1)[mask_BN] == 2).all()


def test_the_auxiliary_loss_is_that_of_all_modules_and_is_added_in_training_only() -> None:
    model, inputs = seq2seq(), batch()
    output = model.train()(**inputs, output_routing=True)
    assert len(output.routing) == 2 + 2 * 2
    torch.testing.assert_close(output.auxiliary_loss, sum(routing.aux_loss for routing in output.routing))
    evaluated = model.eval()(**inputs)
    torch.testing.assert_close(output.loss, evaluated.loss + output.auxiliary_loss)
    assert seq2seq(**DENSE).train()(**inputs).auxiliary_loss is None


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, inputs = seq2seq(), batch()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model.train()(**inputs).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_auto_classes_load_what_was_saved(tmp_path: Path) -> None:
    model, inputs = seq2seq(), batch()
    model.save_pretrained(tmp_path / "seq2seq")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "seq2seq").eval()
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    encoder = MoAForMaskedLM(MoAEncoderConfig(**SIZES, num_hidden_layers=2)).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "encoder").eval()
    ids = inputs["input_ids"]
    assert torch.equal(again(ids).logits, encoder(ids).logits)
    assert again.lm_head.decoder.weight is again.model.embeddings.tokens.weight


def test_generation_is_the_same_alone_and_in_a_batch() -> None:
    model, inputs = seq2seq(), batch()
    how = {"num_beams": 3, "length_penalty": 0.6, "max_new_tokens": 6}
    both = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **how)
    alone = model.generate(inputs["input_ids"][1:, :4], **how)
    assert torch.equal(both[1, : alone.shape[1]], alone[0])


def test_published_sizes() -> None:
    """MoA base has 44.1 M parameters beside the embeddings, as its layers' sizes say; big has 181.2 M."""
    with torch.device("meta"):
        for name, millions in (("moa-base", 65), ("moa-big", 200), ("transformer-base", 65)):
            model = MoATransformerForConditionalGeneration(MoATransformerConfig.named(name, vocab_size=37_000))
            assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.05)
    assert (NAMED["moa-big"]["active_heads"], NAMED["moa-big"]["num_heads"]) == (16, 32)


def test_experts_cost_what_a_token_chooses() -> None:
    ids = torch.randint(4, 40, (1, 8))
    few = forward_macs(seq2seq(num_heads=4), input_ids=ids, decoder_input_ids=ids)
    many = forward_macs(seq2seq(num_heads=16), input_ids=ids, decoder_input_ids=ids)
    router = 12 * SIZES["hidden_size"] * 8 * (2 + 2 * 2)
    assert many - few == router


def test_an_expert_of_two_heads_costs_what_one_of_twice_the_width_costs() -> None:
    """JetMoE's several key-value heads: the same weights and products, but twice as many attention maps."""
    ids = torch.randint(4, 40, (1, 8))
    pairs, one = seq2seq(num_key_value_heads=2, head_dim=4), seq2seq(num_key_value_heads=1, head_dim=8)
    assert {n: p.shape for n, p in pairs.named_parameters()} == {n: p.shape for n, p in one.named_parameters()}
    given = {"input_ids": ids, "decoder_input_ids": ids}
    assert forward_macs(pairs, **given) == forward_macs(one, **given)
    cache = pairs(**given, use_cache=True).cache
    assert cache.self_attention_cache.layers[0].keys.shape == (1, 2, 8, 4)
    assert not torch.allclose(pairs(**given).logits, one(**given).logits)


def test_dense_and_expert_attention_are_told_apart() -> None:
    kinds = {type(module) for module in seq2seq().modules()}
    assert ExpertAttention in kinds and DenseAttention not in kinds
    assert not MoATransformerConfig(**DENSE).routes


def test_experts_may_begin_alike_without_changing_their_size() -> None:
    """Correlated by 0.8, each spread as widely as independent ones."""
    sizes = {**SIZES, "hidden_size": 96, "head_dim": 64}
    for similarity in (0.0, 0.8):
        torch.manual_seed(0)
        model = MoAForMaskedLM(MoAEncoderConfig(**sizes, num_hidden_layers=1, expert_similarity=similarity))
        [experts] = [module.experts for module in model.modules() if isinstance(module, ExpertAttention)]
        for weights_EXY in (experts.q_experts, experts.o_experts):
            flat_EX = weights_EXY.detach().flatten(1)
            between_EE = torch.corrcoef(flat_EX)
            assert between_EE[0, 1:].mean() == pytest.approx(similarity, abs=0.05)
            assert flat_EX.std() == pytest.approx((2 / (96 + 64)) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"active_heads": 6}, "active_heads=6 must be from 1 to num_heads=5"),
        ({"head_dim": 0}, "head_dim=0 must be a whole number"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be a whole number"),
        ({"hidden_size": 25}, "must be even"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"expert_similarity": 1.0}, "expert_similarity=1.0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(MixheadError, match=sentence):
        MoATransformerConfig(**{**SIZES, **change})
    with pytest.raises(MixheadError, match="choose one of"):
        MoATransformerConfig.named("moa-huge")


def test_weights_keep_their_configuration() -> None:
    config = MoATransformerConfig(**SIZES)
    with pytest.raises(MixheadError, match="cannot be changed"):
        config.num_heads = 7


def rotary_encoder(**changes: object) -> MoAForMaskedLM:
    torch.manual_seed(0)
    config = MoAEncoderConfig(**{**SIZES, "num_hidden_layers": 2, "position_embedding_type": "rotary", **changes})
    return with_choices(MoAForMaskedLM(config).eval())


@KINDS
def test_rotary_positions_count_from_token_to_token(sizes: dict[str, object]) -> None:
    model = rotary_encoder(**sizes)
    ids = torch.randint(4, 40, (1, 6), generator=torch.Generator().manual_seed(1))
    alone = model(ids).logits
    padded, mask = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1), torch.tensor([[0] * 3 + [1] * 6])
    torch.testing.assert_close(model(padded, mask).logits[:, 3:], alone, rtol=1e-4, atol=1e-5)
    # Without positions the order of the others would not matter to a token.
    assert not torch.allclose(model(ids[:, [0, 2, 1, 3, 4, 5]]).logits[:, 0], alone[:, 0], atol=1e-3)


def test_rotary_positions_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=16, num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 50.0}
    )
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(7).unsqueeze(0))
    torch.testing.assert_close(rotary(7, 8, 50.0, torch.zeros(1)), theirs)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"position_embedding_type": "learned"}, "choose one of sinusoidal, rotary"),
        ({"rope_theta": 0.0}, "must be a positive number"),
        ({"head_dim": 7}, "must be even: rotary positions turn pairs"),
    ],
)
def test_positions_that_cannot_be_are_refused(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(MixheadError, match=sentence):
        rotary_encoder(**change)


def test_positions_are_saved_with_the_model(tmp_path: Path) -> None:
    model = rotary_encoder(rope_theta=100.0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    ids = torch.arange(4, 12).unsqueeze(0)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.rope_theta == 100.0
