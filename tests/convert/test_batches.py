"""What calibration is given: the main input of any model, and a sentence for everything else."""

import pytest
import torch
from transformers import BatchEncoding, BertConfig, BertForMultipleChoice
from zoo import SIZES, ZOO, pixels, tokens

import mixhead
from mixhead import MixheadError
from mixhead.models.moh_dit import MoHDiT, MoHDiTConfig


def converted(name):
    return mixhead.convert(ZOO[name].make(), mixhead.MoHConfig(active=0.75))


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_images_are_taken_as_tensors(name):
    torch.manual_seed(0)
    report = mixhead.calibrate(converted(name), [pixels(), pixels()])
    again = mixhead.calibrate(converted(name), [{"pixel_values": pixels()}] * 2)
    assert report.tokens == again.tokens > 0


def test_what_a_tokenizer_returns_is_taken():
    ids = tokens()
    report = mixhead.calibrate(
        converted("llama"), [BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})]
    )
    assert report.tokens == ids.numel()


REFUSED = {
    "None": ("llama", lambda: None, "batches must be a list of batches"),
    "a text": ("llama", lambda: "some text", "batches must be a list of batches"),
    "texts": ("llama", lambda: ["some text", "more"], "but it is a str: cut the text into token ids"),
    "texts by name": ("llama", lambda: [{"text": ["some text"]}], "'text' of a batch holds text: cut the text"),
    "one tensor": ("llama", tokens, r"it is a Tensor: give \[batch\], or tensor.split\(4\)"),
    "one mapping": ("llama", lambda: {"input_ids": tokens()}, r"it is a dict: give \[batch\]"),
    "rows": ("llama", lambda: [tokens()[0]], r"must have the shape \[texts, tokens\], not"),
    "lists": ("llama", lambda: [[1, 2, 3]], r"but it is a list: give {'input_ids': tensor}"),
    "lists by name": ("llama", lambda: [{"input_ids": [[1, 2]]}], "'input_ids' of a batch must be a tensor"),
    "images for a language model": (
        "llama",
        lambda: [torch.rand(2, 3, 8, 8)],
        "LlamaForCausalLM reads text. Give images",
    ),
    "ids of others": ("llama", lambda: [tokens() + 10_000], "LlamaForCausalLM knows 0 to"),
    "no ids": ("llama", lambda: [tokens()[:, :0]], "There is no token to read"),
    "too many ids": ("gpt2", lambda: [tokens(1, 65)], "A batch has 65 tokens, but GPT2LMHeadModel has 64 positions"),
    "ids for a model of images": ("vit", lambda: [tokens()], "must be floating numbers, as the image processor"),
    "images with labels": (
        "vit",
        lambda: [(pixels(), torch.zeros(2))],
        r"it is a tuple: give {'pixel_values': tensor}",
    ),
    "nothing": ("llama", list, "batches is empty"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_batch_is_refused(what):
    name, batches, message = REFUSED[what]
    model = converted(name)
    with pytest.raises(MixheadError, match=message):
        mixhead.calibrate(model, batches())
    assert model.config.moh["calibrated"] is False


def test_a_diffusion_transformer_wants_more_than_images():
    dit = MoHDiT(MoHDiTConfig(sample_size=8, hidden_size=16, depth=1, num_heads=4, num_classes=3))
    mixhead.convert(dit, mixhead.MoHConfig(active=0.5))
    with pytest.raises(MixheadError, match=r"does not fit MoHDiT: unknown none, missing t, y"):
        mixhead.calibrate(dit, [torch.randn(2, 4, 8, 8)])
    with pytest.raises(MixheadError, match=r"unknown pixel_values, missing x, t, y"):
        mixhead.calibrate(dit, [{"pixel_values": torch.randn(2, 4, 8, 8)}])


def test_texts_to_choose_among_come_in_threes():
    torch.manual_seed(0)
    model = mixhead.convert(BertForMultipleChoice(BertConfig(**SIZES)).eval(), mixhead.MoHConfig(active=0.5))
    choices = tokens(6).unflatten(0, (2, 3))
    mixhead.calibrate(model, [{"input_ids": choices}])
    assert model(input_ids=choices).logits.shape == (2, 3)
