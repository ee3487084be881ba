"""Converted models write: with and without a cache, padded and not, greedy and with beams."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import EVERY, PADDING, SIZES, TOKENS, WRITERS, ZOO, maker, sound, tokens

import mixhead
from mixhead import MoHConfig
from mixhead.models.hugging_face import attention
from mixhead.ops import IMPLEMENTATIONS, cpu
from mixhead.recording.listen import real_tokens

GREEDY = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}


def converted(name, **config):
    return mixhead.convert(ZOO[name].make(), MoHConfig(**{"active": 0.5, "shared": 0.25, **config}))


def write(model, **arguments):
    """The ids and the logits of every step."""
    out = model.generate(**{**GREEDY, **arguments}, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits, 1)


def padded(lengths, side):
    """Sequences of several lengths in one batch: ids and attention mask."""
    ids = tokens(len(lengths), TOKENS)
    position = torch.arange(TOKENS).expand_as(ids)
    length = torch.tensor(lengths).unsqueeze(-1)
    mask = position >= TOKENS - length if side == "left" else position < length
    return ids.masked_fill(~mask, PADDING), mask.long()


@pytest.mark.parametrize(("name", "router"), [(name, router) for name, router in EVERY if name in WRITERS])
def test_generation_with_a_cache_equals_generation_without(name, router):
    model = converted(name, router=router)
    ids, logits = write(model, input_ids=tokens(), use_cache=True)
    uncached_ids, uncached_logits = write(model, input_ids=tokens(), use_cache=False)
    assert torch.equal(ids, uncached_ids)
    torch.testing.assert_close(logits, uncached_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WRITERS)
def test_an_engine_may_be_asked_for(name, monkeypatch):
    """As the call of the model may; it reaches every call of the generation."""
    model = converted(name)
    ids, logits = write(model, input_ids=tokens())
    asked = []
    attend = attention.head_attention

    def seen(*args, impl, **kwargs):
        asked.append(impl)
        return attend(*args, impl=impl, **kwargs)

    monkeypatch.setattr(attention, "head_attention", seen)
    same_ids, same_logits = write(model, input_ids=tokens(), head_attention_impl="reference")
    assert torch.equal(ids, same_ids) and {*asked} == {"reference"}
    torch.testing.assert_close(logits, same_logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(mixhead.MixheadError, match="impl"):
        write(model, input_ids=tokens(), head_attention_impl="none")


@pytest.mark.parametrize("name", WRITERS)
def test_a_static_cache_gives_the_same(name):
    model = converted(name)
    ids, logits = write(model, input_ids=tokens())
    arguments = {"cache_implementation": "static", "disable_compile": True}
    static_ids, static_logits = write(model, input_ids=tokens(), **arguments)
    assert torch.equal(ids, static_ids)
    torch.testing.assert_close(logits, static_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", WRITERS)
def test_left_padding_changes_nothing(name, use_cache):
    if not use_cache and name not in ("llama", "gemma3"):
        pytest.skip("left padding without a cache differs little between architectures")
    model = converted(name)
    ids, mask = padded([TOKENS, 4], "left")
    _, together = write(model, input_ids=ids, attention_mask=mask, use_cache=use_cache)
    for row, length in enumerate([TOKENS, 4]):
        _, alone = write(model, input_ids=ids[row : row + 1, TOKENS - length :], use_cache=use_cache)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WRITERS)
def test_beam_search_with_a_cache_equals_beam_search_without(name):
    model = converted(name)
    arguments = {**GREEDY, "num_beams": 3, "input_ids": tokens()}
    assert torch.equal(model.generate(**arguments), model.generate(**arguments, use_cache=False))


def test_whisper_writes_with_and_without_a_cache():
    model = converted("whisper")
    arguments = {"input_features": sound(), "decoder_input_ids": tokens()}
    ids, logits = write(model, **arguments)
    uncached_ids, uncached_logits = write(model, **arguments, use_cache=False)
    assert torch.equal(ids, uncached_ids)
    torch.testing.assert_close(logits, uncached_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, animal in ZOO.items() if animal.pads])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_real_tokens(name, side):
    if name == "clip" and side == "left":
        pytest.skip("CLIP counts its positions from the left, padding included")
    if name in ("bert", "roberta") and side == "left":
        pytest.skip("its positions and its first token count from the left, padding included")
    animal, model = ZOO[name], converted(name)
    model = getattr(model, "text_model", model)
    lengths = [TOKENS, 4]
    ids, mask = padded(lengths, side)
    key = "last_hidden_state" if name == "clip" else "logits"
    more = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if animal.writes else {}
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, **more)[key]
        for row in range(2):
            real = mask[row].bool()
            alone = model(input_ids=ids[row : row + 1, real])[key][0]
            found = together[row] if alone.dim() == 1 else together[row, real]  # one answer a sequence, or one a token
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("router", ["linear", "query_norm", "two_stage"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count_in_the_balance_loss(side, router):
    lengths = [TOKENS, 4, 2]
    ids, mask = padded(lengths, side)
    model = converted("llama", router=router, balance_coefficient=1.0)
    with mixhead.keep_routing(model) as log:
        model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    assert all(torch.equal(routing.token_mask_BN, mask.bool()) for _, routing in log.layers)

    def losses(row_ids, row_mask, labels):
        """Loss with and without the balance loss; the difference is the balance loss."""
        position = (row_mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": row_ids, "attention_mask": row_mask, "position_ids": position, "labels": labels}
        return (model.train()(**inputs).loss - model.eval()(**inputs).loss).item()

    # The same sequence three times over: its means are those of one copy, however the copies are padded.
    short = ids[1][mask[1].bool()].unsqueeze(0)
    width = TOKENS - short.shape[1]
    pad = (width, 0) if side == "left" else (0, width)
    wide = torch.nn.functional.pad(short, pad, value=PADDING)
    wide_mask = torch.nn.functional.pad(torch.ones_like(short), pad)
    alone = losses(short, torch.ones_like(short), short)
    beside_padding = losses(
        wide.repeat(3, 1), wide_mask.repeat(3, 1), wide.masked_fill(wide_mask == 0, -100).repeat(3, 1)
    )
    assert alone == pytest.approx(beside_padding, abs=1e-4)
    assert alone > 0


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_padding_does_not_count_in_the_balance_loss_of_encoders(name):
    model = converted(name)
    ids, mask = padded([TOKENS, 4], "right")
    with mixhead.keep_routing(model) as log:
        model(input_ids=ids, attention_mask=mask)
    assert all(torch.equal(routing.token_mask_BN, mask.bool()) for _, routing in log.layers)


@pytest.mark.parametrize("told_by", ["decoder_attention_mask", "labels"])
def test_padding_of_a_decoder_counts_neither_in_its_self_attention_nor_in_its_cross_attention(told_by):
    model = converted("whisper")
    ids, mask = padded([TOKENS, 4], "right")
    arguments = {"decoder_attention_mask": mask} if told_by == "decoder_attention_mask" else {}
    labels = ids.masked_fill(mask == 0, -100)
    with mixhead.keep_routing(model) as log:
        model(input_features=sound(), decoder_input_ids=ids, labels=labels, **arguments)
    masks = {layer: routing.token_mask_BN for layer, routing in log.layers}
    assert masks["model.encoder.layers.0.self_attn"] is None
    decoder = [masks[layer] for layer in masks if "decoder" in layer]
    assert len(decoder) == 4
    assert all(torch.equal(found, mask.bool()) for found in decoder)


@pytest.mark.parametrize("name", WRITERS)
def test_while_generating_every_token_is_recorded_once_and_padding_is_left_out(name):
    model = converted(name)
    ids, mask = padded([TOKENS, 4], "left")
    with mixhead.keep_routing(model) as log:
        model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    layers = {layer for layer, _ in log.layers}
    assert len(layers) == 2
    written = GREEDY["max_new_tokens"] - 1  # the last token is written, never read
    for layer in layers:
        assert log.selected(layer).shape == (2, TOKENS + written, 4)
        # Two of four heads for every real token, so the loads of the four heads add up to two.
        assert float(log.load()[layer].sum()) == pytest.approx(2.0)
        routings = [routing for other, routing in log.layers if other == layer]
        counted = sum(int(real_tokens(routing).sum()) for routing in routings)
        assert counted == TOKENS + 4 + 2 * written


def test_while_whisper_generates_its_encoder_is_recorded_too():
    model = converted("whisper")
    with mixhead.keep_routing(model) as log:
        model.generate(input_features=sound(), decoder_input_ids=tokens(), **GREEDY)
    assert "model.encoder.layers.0.self_attn" in log.load()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("grouped", [True, False])
def test_decoding_with_the_kernel_equals_generation_without_a_cache(cache, grouped, monkeypatch):
    """Heads and sequences long enough for the kernel, left padding, other heads for every row of the batch."""
    if not cpu.available()[0]:
        pytest.skip("on this CPU the kernel is not taken by itself")
    sizes = {**SIZES, "hidden_size": 128, "max_position_embeddings": 128, "num_key_value_heads": 2 if grouped else 4}
    model = maker(LlamaForCausalLM, lambda: LlamaConfig(**sizes))()
    model = mixhead.convert(model, MoHConfig(active=0.5, shared=0.25))
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    lengths = {"max_new_tokens": 8, "min_new_tokens": 8}
    arguments = {"input_ids": ids.masked_fill(mask == 0, PADDING), "attention_mask": mask, **lengths}
    expected_ids, expected = write(model, **arguments, use_cache=False)

    decoded, kernel = [], IMPLEMENTATIONS["cpu"]

    def counted(q_BHND, *args, **kwargs):
        decoded.append(q_BHND.shape[2] == 1)
        return kernel.run(q_BHND, *args, **kwargs)

    monkeypatch.setitem(IMPLEMENTATIONS, "cpu", replace(kernel, run=counted))
    found_ids, found = write(model, **arguments, cache_implementation=cache, disable_compile=True)
    assert sum(decoded) == 2 * 7  # two layers; the first of eight tokens comes from reading the prompt
    assert torch.equal(found_ids, expected_ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
