"""What a language model can be given: positions, numbers of tokens, and which way it reads."""

import pytest
import torch
import transformers as t

from mixhead.errors import MixheadError
from mixhead.models.context import (
    check_ids,
    check_length,
    check_predicts,
    check_reads_forward,
    positions_of,
    window_for,
)

WIDTH = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
BERT = {**WIDTH, "intermediate_size": 32, "max_position_embeddings": 66}
BART = {"vocab_size": 90, "d_model": 32, "max_position_embeddings": 64} | {
    f"{side}_{size}": value
    for side in ("encoder", "decoder")
    for size, value in (("ffn_dim", 32), ("layers", 1), ("attention_heads", 4))
}
GPT2 = {"vocab_size": 90, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}

FIXED = {
    "gpt2": (t.GPT2LMHeadModel, lambda: t.GPT2Config(**GPT2)),
    "gpt-j": (t.GPTJForCausalLM, lambda: t.GPTJConfig(**GPT2, rotary_dim=4)),
    "ctrl": (t.CTRLLMHeadModel, lambda: t.CTRLConfig(**GPT2, dff=32)),
    "mpt": (t.MptForCausalLM, lambda: t.MptConfig(vocab_size=90, max_seq_len=64, d_model=32, n_layers=1, n_heads=4)),
    "opt": (
        t.OPTForCausalLM,
        lambda: t.OPTConfig(**WIDTH, ffn_dim=32, word_embed_proj_dim=32, max_position_embeddings=64),
    ),
    "bart": (t.BartForCausalLM, lambda: t.BartConfig(**BART)),
    "roberta": (t.RobertaForCausalLM, lambda: t.RobertaConfig(**BERT, is_decoder=True)),
}


@pytest.mark.parametrize("name", FIXED)
@torch.no_grad()
def test_as_many_tokens_run_as_are_said_and_not_one_more(name):
    model_class, config = FIXED[name]
    model = model_class(config()).eval()
    assert positions_of(model).count == 64 and positions_of(model).fixed
    ids = torch.randint(3, 90, (1, 65))
    model(input_ids=ids[:, :64])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)
    check_length(model, 64)
    with pytest.raises(MixheadError, match=r"The text has 65 tokens, but .* has 64 positions: give at most so many"):
        check_length(model, 65)


def test_what_has_no_table_is_warned_of(caplog):
    model = t.LlamaForCausalLM(t.LlamaConfig(**WIDTH, intermediate_size=32, max_position_embeddings=64))
    assert not positions_of(model).fixed
    check_length(model, 64)
    assert caplog.text == ""
    check_length(model, 65, "A window")
    assert "A window has 65 tokens, more than the 64 positions" in caplog.text
    bloom = t.BloomForCausalLM(t.BloomConfig(vocab_size=90, hidden_size=32, n_layer=1, n_head=4))
    assert positions_of(bloom).count is None


def test_windows_follow_the_smallest_model_unless_they_are_asked_for():
    with torch.device("meta"):
        models = [model_class(config()) for model_class, config in FIXED.values()]
    assert window_for(models, None, 512) == 64
    assert window_for(models, None, 32) == window_for(models, 32, 512) == 32
    with pytest.raises(MixheadError, match="The window has 65 tokens, but"):
        window_for(models, 65, 512)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[5, 90]]), "holds the token 90, but GPT2LMHeadModel knows 0 to 89: cut the text with"),
        (torch.tensor([[-1, 5]]), "holds the token -1"),
        (torch.zeros(1, 0, dtype=torch.long), "There is no token to read"),
        (torch.zeros(1, 4), "must be integers, but these are torch.float32"),
    ],
)
def test_ids_that_are_none_of_the_model_are_refused(ids, message):
    with pytest.raises(MixheadError, match=message):
        check_ids(t.GPT2LMHeadModel(t.GPT2Config(**GPT2)), ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_sees_ahead_predicts_nothing(dtype):
    ids = torch.randint(3, 90, (32,))
    for model_class, config in FIXED.values():
        check_predicts(model_class(config()).to(dtype).eval(), ids)
    bert = t.BertLMHeadModel(t.BertConfig(**BERT)).to(dtype).eval()
    with pytest.raises(MixheadError, match="BertLMHeadModel sees the words that it would have to predict"):
        check_reads_forward(bert)


def test_who_sees_ahead_without_saying_so_is_found_out():
    """Its attention has no mark that it is no decoder's."""
    config = t.XLNetConfig(vocab_size=90, d_model=32, n_layer=1, n_head=4, d_inner=32)
    model = t.XLNetLMHeadModel(config).eval()
    check_reads_forward(model)
    with pytest.raises(MixheadError, match="XLNetLMHeadModel sees the words"):
        check_predicts(model, torch.randint(3, 90, (32,)))
