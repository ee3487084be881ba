"""Prompts and windows of token ids: they begin as the tokenizer begins a text, and hold known bytes of it."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mixhead.data.windows import begin_tokens, document_windows, prompt_ids, text_windows, token_windows
from mixhead.errors import MixheadError

PROSE = "the state of the union is strong — ünïcode 😀👩‍🚀, and 漢字 too. "


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: "w0" is 1, "w1" is 2 and so on; the end of a document is 0."""
    words = Tokenizer(models.WordLevel({"<end>": 0} | {f"w{n}": n + 1 for n in range(100)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")


def words(first: int, last: int) -> str:
    return " ".join(f"w{n}" for n in range(first, last))


def test_windows_are_consecutive_and_documents_are_joined(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = token_windows(tokenizer, [words(0, 5), words(5, 12)], 4)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [[1, 2, 3, 4], [5, 0, 6, 7], [8, 9, 10, 11]]  # "w11" fills no window


def test_limited_windows_are_spread_over_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    everything = token_windows(tokenizer, [words(0, 60)], 6)
    some = token_windows(tokenizer, [words(0, 60)], 6, limit=4)
    assert some.tolist() == everything[[0, 2, 5, 7]].tolist()
    assert token_windows(tokenizer, [words(0, 60)], 6, limit=99).tolist() == everything.tolist()


def test_windows_tell_their_progress(tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[tuple[int, int]] = []
    token_windows(tokenizer, ["w1 w2"] * 3, 2, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("texts", "window", "limit", "message"),
    [
        ([words(0, 5)], 6, None, "has 5 tokens, fewer than one window of 6; give a longer text or a smaller window"),
        ([], 6, None, "has 0 tokens"),
        ([words(0, 5)], 1, None, "window must be at least 2 tokens"),
        ([words(0, 5)], 2, 0, "limit must be at least 1 window"),
    ],
)
def test_impossible_windows_are_refused(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], window: int, limit: int | None, message: str
) -> None:
    with pytest.raises(MixheadError, match=message):
        token_windows(tokenizer, texts, window, limit)


def byte_level(begins: bool) -> PreTrainedTokenizerFast:
    """A byte-level vocabulary; one that begins puts `<s>` before and `</s>` behind each text, as Gemma's begins."""
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator(["the state of the union is strong"] * 5, trainer)
    if begins:
        raw.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def test_only_what_stands_before_a_text_begins_it(tokenizer: PreTrainedTokenizerFast) -> None:
    assert begin_tokens(tokenizer) == []
    assert begin_tokens(byte_level(begins=False)) == []  # it knows a begin token, and does not use it
    assert begin_tokens(byte_level(begins=True)) == [0]


def test_each_window_begins_as_the_tokenizer_begins_a_text() -> None:
    plain, begun = (text_windows(byte_level(begins), [PROSE * 20], 16) for begins in (False, True))
    assert (begun.ids_WT[:, 0] == 0).all() and (begun.ids_WT[:, 1:] != 0).all()
    text = plain.ids_WT.flatten()
    assert begun.ids_WT[:, 1:].flatten().tolist()[:150] == text.tolist()[:150]
    assert plain.given == begun.given == 1  # either way one token is given, and the others are predicted
    windows = list(document_windows(byte_level(begins=True), PROSE, 16))
    assert all(ids[0] == 0 and len(ids) <= 16 for ids in windows) and sum(map(len, windows)) > 2 * 16


@pytest.mark.parametrize("begins", [False, True])
def test_windows_know_the_bytes_that_they_predict(begins: bool) -> None:
    tokenizer = byte_level(begins)
    windows = text_windows(tokenizer, [PROSE * 10, PROSE * 10], 16)
    for ids_T, size in zip(windows.ids_WT, windows.bytes_W.tolist(), strict=True):
        predicted = [token for token in ids_T[1:].tolist() if token != 1]  # the end of a document is no text
        pieces = [tokenizer.convert_ids_to_tokens(token) for token in predicted]
        assert abs(size - sum(map(len, pieces))) <= 3  # a character is counted where its first byte stands
    room = 16 - begins
    text_tokens = len(tokenizer(PROSE * 10, add_special_tokens=False)["input_ids"])
    covered = windows.ids_WT.shape[0] * room / (2 * text_tokens + 1)
    expected = 20 * len(PROSE.encode()) * covered * (15 / room)
    assert int(windows.bytes_W.sum()) == pytest.approx(expected, rel=0.02)


def test_words_of_other_tokenizers_have_their_spaces_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = text_windows(tokenizer, [words(0, 9)], 3)
    assert windows.bytes_W.tolist() == [6, 6, 5]  # "w1 w2 ", "w4 w5 ", "w7 w8"


@pytest.fixture(scope="module")
def small() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=4)).eval()


def test_a_prompt_begins_once_and_does_not_end(small: GPT2LMHeadModel) -> None:
    inputs, count = prompt_ids(small, byte_level(begins=True), "the state", None, 80)
    ids = inputs["input_ids"][0].tolist()
    assert {*inputs} == {"input_ids", "attention_mask"}
    assert ids[0] == 0 and 1 not in ids
    assert count == 64 - len(ids) + 1  # as many as there is room for: the last one is not read again
    small.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    again, _ = prompt_ids(small, byte_level(begins=True), "<s>the state", None, 80)
    assert again["input_ids"][0].tolist() == ids


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "message"),
    [
        ("", 5, "The prompt holds no token"),
        ("the " * 80, None, "has 64 positions: give a shorter one"),
        ("the state", 80, "it can write at most"),
        ("half \ud83d", 5, r"lone surrogate \(U\+D83D at character 5\)"),
    ],
)
def test_impossible_prompts_are_refused(
    small: GPT2LMHeadModel, prompt: str, new_tokens: int | None, message: str
) -> None:
    with pytest.raises(MixheadError, match=message):
        prompt_ids(small, byte_level(begins=False), prompt, new_tokens, 80)


def test_rotary_models_may_write_beyond_their_positions_if_asked(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, max_position_embeddings=16))
    assert prompt_ids(model, byte_level(begins=False), "the state of", 50, 80)[1] == 50
    assert "more than the 16 positions that LlamaForCausalLM was made for" in caplog.text


def test_text_that_is_no_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(MixheadError, match="lone surrogate"):
        token_windows(tokenizer, ["w1 w2", "w3 \udc80"], 2)
