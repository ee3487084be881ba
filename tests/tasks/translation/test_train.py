"""Translation from end to end, on a language of ten words: data, vocabulary, training, decoding, scores."""

import logging
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from mixhead import store
from mixhead.cli.app import run as run_cli
from mixhead.data.aligned_pages import SentencePair
from mixhead.data.sentence_pairs import write_pairs
from mixhead.data.token_batches import PairBatches
from mixhead.data.vocabulary import check_vocabulary, train_vocabulary
from mixhead.errors import MixheadError
from mixhead.inspect.expert_use import expert_use
from mixhead.models.moa import MoATransformerConfig, MoATransformerForConditionalGeneration
from mixhead.tasks import moa_training
from mixhead.tasks.masked_lm.train import load_masked_lm
from mixhead.tasks.registry import settings_of, train_recipe
from mixhead.tasks.translation.config import TranslateConfig
from mixhead.tasks.translation.scores import score_translations, split_compounds
from mixhead.tasks.translation.translate import clean, load_translator, split_long, translate_lines
from mixhead.training.recipes import Recipe, read_recipe, shipped_recipes

ENGLISH = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
GERMAN = ("eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn")


def sentences(count: int, seed: int) -> list[SentencePair]:
    """Numbers, in English and in German."""
    rng = random.Random(seed)
    drawn = [[rng.randrange(10) for _ in range(rng.randint(1, 3))] for _ in range(count)]
    return [SentencePair(" ".join(ENGLISH[i] for i in n), " ".join(GERMAN[i] for i in n)) for n in drawn]


def recipe(folder: Path, **changes: object) -> Recipe:
    values = {
        "data": str(folder / "train.tsv"),
        "tests": {"numbers": str(folder / "test.tsv")},
        "vocabulary": 300,
        "model": {
            "hidden_size": 48,
            "intermediate_size": 96,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "num_heads": 4,
            "active_heads": 2,
            "head_dim": 16,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
        },
        "max_tokens": 256,
        "max_length": 20,
        "steps": 6,
        "warmup": 0.5,
        "learning_rate": 5e-3,
        "save_every": 2,
        "average": 2,
        "beams": 2,
        "precision": "float32",
        "max_grad_norm": 1.0,
    }
    return Recipe("numbers", "translation", {**values, **changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(sentences(300, seed=0), folder / "train.tsv")
    write_pairs(sentences(20, seed=1), folder / "test.tsv")
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt to count; the folder of its run."""
    run = tmp_path_factory.mktemp("runs") / "run"
    result = train_recipe(recipe(data, steps=250, warmup=0.16, save_every=25, learning_rate=5e-3), run)
    # BLEU counts four words in a row; these sentences have three at most. Other seeds reach 76 to 84.
    assert result.metrics["numbers: chrF"] > 50
    return run


def test_a_translator_with_few_positions_translates_long_lines_in_pieces(tmp_path, caplog):
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32}
    tokenizer = train_vocabulary(["one two three four five six"] * 3, 300)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    config = BartConfig(**sizes, **heads, **special, vocab_size=len(tokenizer), forced_eos_token_id=None)
    store.save(BartForConditionalGeneration(config).eval(), tokenizer, tmp_path / "bart")
    translator = load_translator(tmp_path / "bart")
    lines = ["one two " * 60, "three"]
    assert len(list(translate_lines(*translator, lines, TranslateConfig(beams=1)))) == 2
    assert "has more than 32 tokens: it is translated in" in caplog.text


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a\tb\r\n c\x00d\x1b[0m\u2028e\u0085 ", "a b c d [0m e"),
        ("می\u200cروم", "می\u200cروم"),  # a joiner inside a word
        ("👩\u200d🚀 ok", "👩\u200d🚀 ok"),  # and inside an emoji
        ("\ue000 \U000f0000", "\ue000 \U000f0000"),  # for private use
        ("\U0001fae8 \U0001faea \U0001f6d8", "\U0001fae8 \U0001faea \U0001f6d8"),  # newer than Python's tables
        ("co\u00adop \ufeffx", "co\u00adop \ufeffx"),
        ("half \ud83d", "half"),
    ],
)
def test_only_what_breaks_a_line_is_cleaned_away(text, cleaned):
    assert clean(text) == cleaned


def test_a_run_that_was_interrupted_goes_on_as_if_nothing_had_happened(data: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    expected = train_recipe(recipe(data, tests={}), whole)

    class StopAtStepThree(Exception):
        pass

    asked = recipe(data, tests={})
    original = moa_training.MoATrainer.finish_step

    def finish_step(self):
        if self.state.global_step == 3:
            raise StopAtStepThree
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moa_training.MoATrainer, "finish_step", finish_step)
        with pytest.raises(StopAtStepThree):
            train_recipe(asked, halves)
    resumed = train_recipe(asked, halves, resume=True)
    first = load_translator(expected.folder)[0].state_dict()
    second = load_translator(resumed.folder)[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_add_up_to_those_of_one_large_batch(data: Path) -> None:
    """The auxiliary loss counts once per step, however the step is cut."""
    torch.manual_seed(0)
    sizes = recipe(data).values["model"]
    model = MoATransformerForConditionalGeneration(MoATransformerConfig(vocab_size=50, **sizes)).train()
    ids = torch.randint(4, 50, (4, 5))
    model(ids, labels=ids, num_items_in_batch=20).loss.backward()
    whole = model.model.encoder.layers[0].feed_forward.fc1.weight.grad.clone()
    model.zero_grad()
    for part in ids.split(2):
        model(part, labels=part, num_items_in_batch=20).loss.backward()
    # The losses of the routers are no sums over tokens, so the parts add up nearly, not exactly.
    torch.testing.assert_close(model.model.encoder.layers[0].feed_forward.fc1.weight.grad, whole, rtol=0.05, atol=1e-4)


class Echo:
    """Stands in for a model: the translation of a sentence is that sentence."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **how: object) -> torch.Tensor:
        assert max_new_tokens > input_ids.shape[1] and how["num_beams"] == 2
        self.batches.append(tuple(input_ids.shape))
        return input_ids


def test_one_line_out_for_each_line_in(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = train_vocabulary([" ".join(ENGLISH)] * 50, 300)
    lines = [
        "one two three",
        "",
        "   ",
        "four\x0bfive\u2028six\x00",
        "😀 two 👍🏽",
        "seven " * 300,
        "x" * 900,
        "これは英語ではありません。どうしますか。",
        "eight",
    ]
    model = Echo()
    config = TranslateConfig(beams=2, max_source_tokens=24, look_ahead=4, batch_tokens=64)
    with caplog.at_level(logging.WARNING, "mixhead"):
        translations = list(translate_lines(model, tokenizer, lines, config))  # type: ignore[arg-type]
    assert all("\n" not in text and text.isprintable() for text in translations)
    assert [text.replace(" ", "") for text in translations] == [clean(line).replace(" ", "") for line in lines]
    assert translations[3] == "four five six" and translations[5] == clean(lines[5])  # pieces are joined by spaces
    assert all(length <= 24 and count * length <= 64 for count, length in model.batches)
    assert "Line 6 has more than 24 tokens" in caplog.text
    assert "Line 8 is of a language or script" in caplog.text


def test_beam_search_with_the_cache_finds_what_it_finds_without(trained: Path) -> None:
    model, tokenizer = load_translator(trained / "model")
    inputs = tokenizer(["one two", "three four five six"], return_tensors="pt", padding=True)
    found = [
        model.generate(**inputs, num_beams=4, length_penalty=0.6, max_new_tokens=12, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*found)


def test_the_command_line(trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source.txt"
    source.write_text("one\n\ntwo three\n", encoding="utf-8")
    model = str(trained / "model")
    assert run_cli(["translate", model, "-i", str(source), "--beams", "1"]) == 0
    expected = translate_lines(*load_translator(model), ["one", "", "two three"], TranslateConfig(beams=1))
    assert capsys.readouterr().out == "".join(f"{line}\n" for line in expected)
    assert run_cli(["evaluate-translation", model, "--data", str(data / "test.tsv"), "--beams", "1"]) == 0
    out = capsys.readouterr().out
    assert "nrefs:1|case:mixed" in out and "chrF signature" in out and "compound-split BLEU" in out
    assert run_cli(["expert-words", model, "--data", str(data / "train.tsv"), "--top", "2"]) == 0
    assert "| decoder.layers.0.cross_attention | 0 |" in capsys.readouterr().out
    assert run_cli(["translate", str(tmp_path / "nowhere")]) == 2


def test_experts_are_told_which_words_they_serve(trained: Path) -> None:
    model, tokenizer = load_translator(trained / "model")
    use = expert_use(model, tokenizer, [SentencePair("one two", "eins zwei"), SentencePair("three", "drei")])
    assert list(use) == [
        "encoder.layers.0.self_attention",
        "decoder.layers.0.self_attention",
        "decoder.layers.0.cross_attention",
    ]
    encoder, decoder = use["encoder.layers.0.self_attention"], use["decoder.layers.0.cross_attention"]
    assert list(dict.fromkeys(encoder.words)) == ["one", "two", "</s>", "three"] and decoder.words[0] == "<s>"
    assert encoder.selected_TE.shape[0] == len(encoder.words) == len(encoder.sentence_T)
    assert encoder.words[int((encoder.sentence_T == 1).argmax())] == "three"
    assert torch.all(encoder.selected_TE.sum(1) == 2)


def test_a_vocabulary_of_another_model_is_refused(trained: Path) -> None:
    model, _ = load_translator(trained / "model")
    other = train_vocabulary([f"word{i} thing{i}" for i in range(400)], 500)
    smaller = train_vocabulary(["one two"], 261)
    for vocabulary in (other, smaller):
        with pytest.raises(MixheadError, match="do not belong"):
            check_vocabulary(vocabulary, model)
    with pytest.raises(MixheadError, match="belongs to another model"):
        model(torch.tensor([[model.config.vocab_size]]), decoder_input_ids=torch.tensor([[1]]))


def test_weights_that_are_cut_off_are_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "model", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(MixheadError, match=r"cannot be read \(SafetensorError"):
        load_translator(tmp_path / "cut")
    with pytest.raises(MixheadError, match="fills no gaps"):
        load_masked_lm(trained / "model")


def test_batches_hold_every_short_pair_once_a_round() -> None:
    pairs = sentences(200, seed=0)
    tokenizer = train_vocabulary((side for pair in pairs for side in pair), 300)
    batches = PairBatches(tokenizer, pairs, max_tokens=60, max_length=8, seed=0)
    assert 0 < len(batches.lengths) < 200
    for number in range(3):
        plan = batches._batches(number)
        assert sorted(i for batch in plan for i in batch) == sorted(batches.lengths)
        assert len(plan) == batches.batches_per_round
    for place in range(batches.batches_per_round):
        batch = batches[place]
        assert max(batch["input_ids"].numel(), batch["labels"].numel()) <= 60
    assert not all(torch.equal(batches[0][k], batches[batches.batches_per_round][k]) for k in ("input_ids", "labels"))


def test_long_lines_are_cut_and_nothing_is_dropped() -> None:
    tokenizer = train_vocabulary([" ".join(ENGLISH)], 300)
    for text in ("one two three " * 50, "z" * 500, f"one {'é' * 300} two"):
        pieces = split_long(tokenizer, clean(text), 16)
        assert len(pieces) > 1
        assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
        assert all(len(tokenizer(piece)["input_ids"]) <= 16 for piece in pieces)


def test_scores_say_how_they_were_counted() -> None:
    references = ["Die E-Mail ist hier .", "Das ist ein Haus ."]
    scores = score_translations(references, references)
    assert scores.bleu == pytest.approx(100) and scores.chrf == pytest.approx(100)
    assert "version:" in scores.bleu_signature and "nc:6" in scores.chrf_signature
    assert split_compounds("Die E-Mail - ja") == "Die E ##AT##-##AT## Mail - ja"
    # A compound of which one half is right counts as half right only there.
    half = score_translations(["Die E-Post ist hier ."], ["Die E-Mail ist hier ."])
    assert half.compound_split_bleu != pytest.approx(half.bleu)
    with pytest.raises(MixheadError, match="line by line"):
        score_translations(["a"], ["a", "b"])


@pytest.mark.parametrize("name", [n for n, f in shipped_recipes().items() if "task: translation" in f.read_text()])
def test_shipped_recipes_are_complete(name: str) -> None:
    assert settings_of(read_recipe(name)).learning_rate > 0


def test_settings_that_cannot_be_are_refused(data: Path, tmp_path: Path) -> None:
    for change, sentence in (
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"model": {"name": "moa-huge"}}, "unknown: choose one of"),
        ({"model": {"widht": 3}}, "unknown key model.widht"),
        ({"vocabulary": 100}, "too small"),
        ({"data": str(data / "nothing.tsv")}, "There is no text file"),
    ):
        with pytest.raises(MixheadError, match=sentence):
            train_recipe(recipe(data, **change), tmp_path / "run")
