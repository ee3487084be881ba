"""The same calls from Python: models with few positions, tokens of another tokenizer, encoders, text with its bytes."""

import math

import pytest
import torch
import transformers as t

import mixhead
from mixhead import MixheadError, MoHConfig
from mixhead.data.windows import Windows
from mixhead.inspect.attention import attention_maps
from mixhead.tasks.language_modelling.evaluate import perplexity, ratio_band
from mixhead.tasks.language_modelling.train import TuneConfig, tune

SIZES = {"vocab_size": 90, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
BERT = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def gpt2(routed=False):
    torch.manual_seed(0)
    model = t.GPT2LMHeadModel(t.GPT2Config(**SIZES)).eval()
    return mixhead.convert(model, MoHConfig(active=0.5)) if routed else model


def windows(length, first=3):
    return torch.arange(first, first + 4 * length).remainder(87).view(4, length) + 3


CALLS = {
    "perplexity": lambda ids, run: perplexity(gpt2(), ids),
    "tune": lambda ids, run: tune(gpt2(), ids, TuneConfig(tokens=64), run, progress=False),
    "calibrate": lambda ids, run: mixhead.calibrate(gpt2(routed=True), [ids]),
    "attention_maps": lambda ids, run: attention_maps(gpt2(routed=True), input_ids=ids),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_refuses_what_the_model_cannot_read(call, tmp_path):
    with pytest.raises(
        MixheadError, match=r"has 17 tokens, but GPT2LMHeadModel has 16 positions: give at most so many"
    ):
        CALLS[call](windows(17), tmp_path / "run")
    with pytest.raises(MixheadError, match=r"holds the token 95, but GPT2LMHeadModel knows 0 to 89"):
        CALLS[call](torch.full((2, 8), 95), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model_class", [t.BertForMaskedLM, t.BertLMHeadModel])
def test_an_encoder_has_no_perplexity(model_class):
    with pytest.raises(MixheadError, match=f"{model_class.__name__} sees the words that it would have to predict"):
        perplexity(model_class(t.BertConfig(**BERT)), windows(16))


def test_what_is_given_is_not_predicted():
    ids_WT = windows(16)
    for given in (1, 3):
        found = perplexity(gpt2(), Windows(ids_WT, given, torch.tensor([10, 20, 30, 40])))
        with torch.no_grad():
            labels = ids_WT.clone()
            labels[:, :given] = -100
            expected = float(gpt2()(input_ids=ids_WT, labels=labels).loss)
        assert found.mean_nll == pytest.approx(expected, rel=1e-5)
        assert (found.tokens, found.bytes) == (4 * (16 - given), 100)
        assert found.bits_per_byte == pytest.approx(expected * found.tokens / math.log(2) / 100, rel=1e-5)
    assert math.isnan(perplexity(gpt2(), ids_WT).bits_per_byte)  # of mere ids nobody knows the text


def test_measurements_of_other_windows_are_not_compared_window_by_window():
    one, other = perplexity(gpt2(), windows(16)), perplexity(gpt2(), windows(16, first=7))
    assert ratio_band(one, one) == (1.0, 1.0)
    with pytest.raises(MixheadError, match="cut by different tokenizers or from different texts: compare their bits"):
        ratio_band(one, other)
