"""The command line on a tiny model: every verb does its work, and every mistake ends in a sentence and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mixhead import precision
from mixhead.cli.app import run
from mixhead.data.text import text_source
from mixhead.models.hugging_face import MoHModelMixin


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A random Llama of two layers with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<pad>", "<s>", "</s>"])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator([text[:2000] for text in text_source("addresses", "validation")[:4]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Some prose."""
    file = tmp_path_factory.mktemp("texts") / "prose.txt"
    file.write_text(text_source("addresses", "validation")[0][:20_000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def converted(dense, text, tmp_path_factory) -> Path:
    """The tiny model at 3 of 4 heads, calibrated."""
    folder = tmp_path_factory.mktemp("models") / "converted"
    assert run(["convert", str(dense), str(folder), "--active", "0.75", "--text", str(text), "--tokens", "1024"]) == 0
    return folder


def test_convert_writes_a_calibrated_model(converted):
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert isinstance(model, MoHModelMixin)
    layers = model.config.moh["layers"]
    assert sum(layer["active_heads"] for layer in layers) == 6
    assert model.config.moh["balance_coefficient"] == 0.0
    skipped = [p for name, p in model.named_parameters() if name.endswith("moh_skipped")]
    assert skipped and all(p.abs().sum() > 0 for p in skipped)


def test_convert_is_told_the_weight_of_the_balance_loss(dense, tmp_path):
    folder = tmp_path / "converted"
    assert run(["convert", str(dense), str(folder), "--router", "query_norm", "--balance", "0.25"]) == 0
    assert AutoModelForCausalLM.from_pretrained(folder).config.moh["balance_coefficient"] == 0.25


def test_evaluate_prints_all_models_and_writes_json(dense, converted, text, tmp_path, capsys):
    file = tmp_path / "table.json"
    arguments = ["--text", str(text), "--window", "64", "--tokens", "640", "--json", str(file)]
    assert run(["evaluate", str(dense), str(converted), *arguments]) == 0
    table = json.loads(file.read_text())
    assert [row["active_heads"] for row in table["rows"]] == [4, 3]
    assert table["rows"][0]["ratio"] == 1.0
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 of 4 (75.0%)" in shown
    assert "tuning tokens" not in shown  # a folder does not say how long it was tuned
    assert table["rows"][1]["tuning_tokens"] is None


def test_tune_saves_a_model_and_resumes(converted, text, tmp_path):
    arguments = ["tune", str(converted), str(tmp_path / "run"), "--text", str(text), "--window", "32"]
    arguments += ["--batch-size", "2", "--tokens", "256", "--no-bf16", "--save-every", "2"]
    assert run(arguments) == 0
    assert run([*arguments, "--resume"]) == 0
    log = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert len(log) == 1 + 4
    [model] = {file.parent for file in (tmp_path / "run").rglob("config.json") if "checkpoint" not in str(file)}
    # The other door to the same training.
    assert run(["train", str(tmp_path / "run" / "recipe.yaml"), "--run", str(tmp_path / "again")]) == 0
    columns = [
        [row.split(",")[2] for row in (tmp_path / name / "log.csv").read_text().splitlines()]
        for name in ("run", "again")
    ]
    assert columns[0] == columns[1] and columns[0][0] == "loss"
    assert isinstance(AutoModelForCausalLM.from_pretrained(model), MoHModelMixin)


def test_tune_says_in_what_it_computes_and_keeps_to_it(converted, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_speed", lambda: 0.04)
    precision.faster_in_bfloat16.cache_clear()
    arguments = ["tune", str(converted), str(tmp_path / "run"), "--text", str(text), "--window", "32"]
    arguments += ["--batch-size", "2", "--tokens", "64"]
    assert run(arguments) == 0
    assert "Computing in float32: products of matrices take 25 times as long" in capsys.readouterr().err
    assert "precision: float32" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert_refused([*arguments, "--resume", "--bf16"], capsys, "precision was 'float32' and is 'bfloat16'")
    precision.faster_in_bfloat16.cache_clear()


def test_generate_is_repeatable_and_tells_the_heads(converted, capsys):
    outputs = []
    for _ in range(2):
        assert run(["generate", str(converted), "--prompt", "The people", "--max-new-tokens", "5"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert "6 of 8 heads per token" in outputs[0]


def test_doctor_names_engines_and_missing_packages(capsys):
    assert run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "torch" in shown and "reference" in shown and "peft" in shown


def broken(tmp_path, dense, how) -> Path:
    """A copy of the tiny model that is damaged."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in dense.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "nan":
        model = AutoModelForCausalLM.from_pretrained(dense)
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight.fill_(torch.nan)
        model.save_pretrained(folder)
    else:
        weights.unlink()
    return folder


def assert_refused(arguments, capsys, *words):
    assert run([str(argument) for argument in arguments]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in error
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--active", "0"], "active"),
        (["--active", "1.5"], "between 0 and 1"),
        (["--active", "0.05"], "active"),
        (["--active", "0.5", "--shared", "0.75"], "shared"),
        (["--active-heads", "9"], "at most 4"),
        (["--router", "magic"], "magic"),
        (["--router", "two_stage", "--group-balanced"], "group-balanced"),
        (["--official", "nonsense"], "moh-llama"),
        (["--tokens", "many"], "integer"),
    ],
)
def test_impossible_conversions_are_refused_and_write_nothing(dense, text, tmp_path, capsys, options, word):
    out = tmp_path / "out"
    assert_refused(["convert", dense, out, "--text", text, *options], capsys, word)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "word"), [(b"", "empty"), (b"a\x00b", "binary"), (b"\xff\xfeabc\xe9", "UTF-8")])
def test_unusable_texts_are_refused(dense, tmp_path, capsys, content, word):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(content)
    assert_refused(["convert", dense, tmp_path / "out", "--text", bad], capsys, word)
    assert_refused(["evaluate", dense, "--text", bad], capsys, word)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "word"),
    [("truncated", "truncated or corrupt"), ("absent", "holds no weights"), ("nan", "NaN or infinity")],
)
def test_damaged_models_are_refused(dense, text, tmp_path, capsys, how, word):
    folder = broken(tmp_path, dense, how)
    assert_refused(["convert", folder, tmp_path / "out", "--text", text, "--tokens", "1024"], capsys, word)
    assert not (tmp_path / "out").exists()


def test_a_missing_model_and_an_existing_target_are_refused(dense, text, tmp_path, capsys):
    assert_refused(["generate", tmp_path / "nowhere"], capsys, "nowhere")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert_refused(["convert", dense, tmp_path / "out", "--text", text], capsys, "not empty")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_distillation_needs_a_teacher(converted, tmp_path, capsys):
    assert_refused(["tune", converted, tmp_path / "run", "--distillation", "0.5"], capsys, "--teacher")


def test_the_installed_command_ends_with_2_and_without_a_traceback(tmp_path):
    command = [sys.executable, "-c", "from mixhead.cli import main; main()"]
    done = subprocess.run([*command, "convert", "nowhere", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "nowhere" in done.stderr and "Traceback" not in done.stderr
    helped = subprocess.run([*command, "convert", "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "default: 0.75" in helped.stdout
