"""Attention weights for BertViz and CircuitsVis."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mixhead
from mixhead import MixheadError
from mixhead.inspect.attention import attention_maps, to_bertviz, to_circuitsvis

IDS = torch.tensor([[1, 2, 3, 4, 5]])
TOKENS = ["<s>", " a", " <b>", " c", " d"]


@pytest.fixture
def dense():
    sizes = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(sizes).eval()


def test_weights_are_those_of_the_model_where_a_head_is_used_and_0_elsewhere(dense):
    with torch.no_grad():
        expected = dense(IDS, output_attentions=True).attentions[0]
    model = mixhead.convert(dense, mixhead.MoHConfig(active=0.5, shared=0.25))
    maps = attention_maps(model, input_ids=IDS)
    with mixhead.keep_routing(model) as log, torch.no_grad():
        model(IDS)
    selected_1HN1 = log.layers[0][1].selected_BNH.transpose(1, 2).unsqueeze(-1)
    assert list(maps) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    torch.testing.assert_close(maps["model.layers.0.self_attn"], expected * selected_1HN1)


def test_padding_gets_no_weight(dense):
    model = mixhead.convert(dense, mixhead.MoHConfig(active=0.5, shared=0.25))
    maps = attention_maps(model, input_ids=IDS, attention_mask=torch.tensor([[0, 0, 1, 1, 1]]))
    weights_1HNT = maps["model.layers.0.self_attn"]
    assert weights_1HNT[:, :, 2:, :2].abs().max() == 0
    assert weights_1HNT.isfinite().all()


def test_bertviz_takes_them(dense):
    pytest.importorskip("bertviz", reason="BertViz is not installed")
    maps = attention_maps(mixhead.convert(dense, mixhead.MoHConfig(active=0.5, shared=0.25)), input_ids=IDS)
    page = to_bertviz(maps, TOKENS, html_action="return").data
    assert "bertviz" in page
    with pytest.raises(MixheadError, match="4 tokens were given"):
        to_bertviz(maps, TOKENS[:4], html_action="return")


def test_circuitsvis_takes_them(dense):
    pytest.importorskip("circuitsvis", reason="CircuitsVis is not installed")
    maps = attention_maps(mixhead.convert(dense, mixhead.MoHConfig(active=0.5, shared=0.25)), input_ids=IDS)
    page = str(to_circuitsvis(maps, TOKENS, "model.layers.1.self_attn"))
    assert "AttentionHeads" in page
    assert "head 3" in page
    with pytest.raises(MixheadError, match="No layer 'x' routes"):
        to_circuitsvis(maps, TOKENS, "x")


def test_a_dense_model_is_refused(dense):
    with pytest.raises(MixheadError, match="not converted"):
        attention_maps(dense, input_ids=IDS)
