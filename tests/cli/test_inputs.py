"""What users give to the verbs: models of every kind from folders, their own texts and prompts, impossible options."""

import io
import json
import re
import shutil
import sys

import pytest
import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import mixhead
from mixhead import store
from mixhead.cli.app import run
from mixhead.data.text import text_source

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
BERT = {**SIZES, "intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": 1}
GPT2 = {"vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0}
PROSE = text_source("addresses", "validation")[0][:12_000]


def tokenizer(begins=False, size=300):
    """A byte-level vocabulary that, as many do, also hands out `token_type_ids`."""
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>", "[MASK]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator([PROSE], trainer)
    if begins:
        raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "mask_token": "[MASK]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return t.PreTrainedTokenizerFast(tokenizer_object=raw, model_input_names=names, **special)


def saved(model, folder, **kinds):
    torch.manual_seed(0)
    store.save(model.eval(), tokenizer(**kinds), folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models of several kinds, each in its folder."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    llama = t.LlamaForCausalLM(t.LlamaConfig(**LLAMA))
    vit = t.ViTForImageClassification(t.ViTConfig(image_size=8, patch_size=4, **dict(list(SIZES.items())[1:])))
    made = {
        "llama": saved(llama, root / "llama"),
        "begins": saved(llama, root / "begins", begins=True),
        "coarse": saved(t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)), root / "coarse", size=260),
        "gpt2": saved(t.GPT2LMHeadModel(t.GPT2Config(**GPT2)), root / "gpt2"),
        "masked": saved(t.BertForMaskedLM(t.BertConfig(**BERT)), root / "masked"),
        "encoder": saved(t.BertLMHeadModel(t.BertConfig(**BERT)), root / "encoder"),
        "vit": str(root / "vit"),
    }
    store.save(vit, t.ViTImageProcessorPil(size={"height": 8, "width": 8}), root / "vit")
    mixhead.convert(llama, mixhead.MoHConfig(active=0.5, router="query_norm"))
    gpt2 = mixhead.convert(t.GPT2LMHeadModel(t.GPT2Config(**GPT2)), mixhead.MoHConfig(active=0.5, router="query_norm"))
    return {
        **made,
        "routed": saved(llama, root / "routed", begins=True),
        "small": saved(gpt2, root / "small"),
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "prose.txt"
    file.write_text(PROSE, encoding="utf-8")
    return str(file)


def said(capsys):
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return re.sub(r"\s+", " ", captured.out + captured.err)


def refused(arguments, capsys, *words):
    assert run([str(argument) for argument in arguments]) == 2
    sentence = said(capsys)
    for word in words:
        assert word in sentence, sentence


def table_of(models, text, tmp_path, *options):
    file = tmp_path / "table.json"
    assert run(["evaluate", *models, "--text", text, "--tokens", "512", "--json", str(file), *options]) == 0
    return json.loads(file.read_text())


# A model with 64 positions.


def test_every_verb_follows_the_positions_of_the_model(folders, text, tmp_path, capsys):
    common = ["--text", text, "--tokens", "512"]
    assert run(["convert", folders["gpt2"], str(tmp_path / "out"), *common]) == 0
    assert run(["evaluate", folders["llama"], str(tmp_path / "out"), *common]) == 0
    assert "in windows of 64" in said(capsys)
    assert run(["tune", str(tmp_path / "out"), str(tmp_path / "run"), *common, "--batch-size", "2", "--no-bf16"]) == 0
    assert "window: 64" in (tmp_path / "run" / "recipe.yaml").read_text()
    page = ["--out", str(tmp_path / "page.html"), "--overwrite"]
    assert run(["inspect", folders["small"], "--text", text, "--tokens", "200", *page]) == 0
    assert run(["inspect", folders["small"], "--prompt", "the state", *page]) == 0
    assert run(["generate", folders["small"], "--prompt", "the state"]) == 0
    said(capsys)


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("evaluate", ["--window", "65"]),
        ("tune", ["RUN", "--window", "65"]),
        ("generate", ["--max-new-tokens", "64"]),
        ("bench", ["record", "MODEL", "heads.safetensors", "--tokens", "65"]),
        ("bench", ["model", "MODEL", "--tokens", "65", "--seconds", "0", "--rounds", "1"]),
        ("inspect", ["--prompt", "the", "--tokens", "64"]),
    ],
)
def test_what_is_asked_beyond_them_is_refused(verb, options, folders, text, tmp_path, capsys):
    places = {"RUN": str(tmp_path / "run"), "MODEL": folders["small"]}
    options = [places.get(option, option) for option in options]
    texts = ["--text", text] if verb in ("evaluate", "tune") else []
    refused([verb, *([] if verb == "bench" else [folders["small"]]), *options, *texts], capsys, "64 positions")


# Tokenizers.


def test_each_model_reads_with_its_own_tokenizer(folders, text, tmp_path, capsys):
    both = table_of([folders["llama"], folders["coarse"]], text, tmp_path, "--window", "64")
    shown = said(capsys)
    alone = table_of([folders["coarse"]], text, tmp_path, "--window", "64")["rows"][0]
    first, second = both["rows"]
    assert second["perplexity_value"] == alone["perplexity_value"]
    assert "bits per byte" in shown
    assert second["ratio"] is None and first["ratio"] == 1.0
    for row in both["rows"]:  # random weights: nearly log2(vocabulary) bits for the bytes of a token
        bits = row["perplexity"]["mean_nll"] * row["perplexity"]["tokens"] / 0.6931471805599453
        assert row["bits_per_byte"] == pytest.approx(bits / row["perplexity"]["bytes"])
    assert first["perplexity"]["bytes"] > 1.2 * second["perplexity"]["bytes"]  # it has words, the other hardly any


def test_one_tokenizer_needs_no_bits_per_byte(folders, text, tmp_path, capsys):
    table = table_of([folders["begins"], folders["routed"]], text, tmp_path, "--window", "64")
    assert "bits per byte" not in said(capsys)
    assert table["rows"][1]["ratio"] is not None


def test_windows_begin_as_the_model_expects(folders, text, tmp_path):
    """The perplexity is that of begin-of-text and 63 tokens, computed here by hand."""
    row = table_of([folders["begins"]], text, tmp_path, "--window", "64", "--dtype", "float32")["rows"][0]
    model, reader = store.load_causal_lm(folders["begins"])
    ids = torch.tensor(reader(PROSE, add_special_tokens=False)["input_ids"])
    count = len(ids) // 63
    rows = ids[: count * 63].view(count, 63)[torch.arange(8) * count // 8]
    begun = torch.cat([torch.zeros(8, 1, dtype=torch.long), rows], 1)
    with torch.no_grad():
        loss = float(model(input_ids=begun, labels=begun).loss)
    assert row["perplexity"]["mean_nll"] == pytest.approx(loss, rel=1e-5)
    assert row["perplexity"]["tokens"] == 8 * 63


def test_recordings_begin_each_window_as_the_model_expects(folders, text, tmp_path):
    kept = tmp_path / "kept"
    command = ["inspect", folders["routed"], "--text", text, "--tokens", "3000", "--terminal", "--save", str(kept)]
    assert run(command) == 0
    recording = mixhead.Recording(kept)
    tokens = recording.tokens(recording.layers[0])
    begun = tokens.labels["token"] == 0
    assert begun.sum() == 2 and (tokens.position[begun] == 0).all()  # windows of 2,048 tokens


def test_tokens_that_a_model_does_not_know_are_refused(folders, text, tmp_path, capsys):
    small = t.LlamaForCausalLM(t.LlamaConfig(**{**LLAMA, "vocab_size": 200}))
    folder = saved(small, tmp_path / "small")
    for command in (
        ["evaluate", folder, "--text", text],
        ["convert", folder, str(tmp_path / "out"), "--text", text],
        ["tune", folder, str(tmp_path / "run"), "--text", text],
        ["generate", folder, "--prompt", "the people of the state"],
    ):
        refused(command, capsys, "LlamaForCausalLM knows 0 to 199: cut the text with the model's own tokenizer")
    assert not (tmp_path / "out").exists()


def test_a_teacher_must_read_the_same_tokens(folders, text, tmp_path, capsys):
    command = ["tune", folders["llama"], str(tmp_path / "run"), "--text", text, "--distillation", "0.5", "--teacher"]
    refused([*command, folders["coarse"]], capsys, "different tokenizers")


# Prompts.


def test_a_prompt_is_continued_whatever_its_tokenizer_hands_out(folders, capsys):
    for name in ("llama", "begins"):
        assert run(["generate", folders[name], "--prompt", "the state", "--max-new-tokens", "3"]) == 0
        assert "the state" in said(capsys)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--prompt", ""], "The prompt holds no token"),
        (["--prompt", "a\ud83d"], "lone surrogate (U+D83D at character 1)"),
        (["--prompt", "a", "--prompt-file", "TEXT"], "Give one of a prompt (--prompt) and a file"),
    ],
)
def test_impossible_prompts_are_refused(options, word, folders, text, capsys):
    options = [text if option == "TEXT" else option for option in options]
    refused(["generate", folders["llama"], *options], capsys, word)
    if "--prompt-file" not in options:
        refused(["inspect", folders["routed"], *options], capsys, word)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_is_not_utf_8_shows_what_it_can(encoding, folders, monkeypatch):
    shown = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, stream in shown.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding, write_through=True))
    command = ["generate", folders["llama"], "--prompt", "the state — 漢", "--max-new-tokens", "2"]
    assert run(command) == 0
    assert run(["generate", "漢字"]) == 2
    assert run(["inspect", folders["routed"], "--prompt", "漢", "--tokens", "2", "--terminal"]) == 0
    assert b"the state ? ?" in shown["stdout"].getvalue()
    assert b"There is no model folder ??" in shown["stderr"].getvalue()


def test_names_that_are_no_utf_8_are_refused_in_a_sentence(folders, tmp_path, capsys):
    command = ["inspect", folders["routed"], "--prompt", "the", "--tokens", "2", "--out", str(tmp_path / "page.html")]
    refused([*command, "--title", "heads \udcff"], capsys, "holds bytes that are no UTF-8 text")
    assert not any(tmp_path.iterdir())


# Models of other kinds.


KINDS = [(name, verb) for name in ("masked", "encoder", "vit") for verb in ("evaluate", "generate", "tune", "inspect")]


@pytest.mark.parametrize(("name", "verb"), [kind for kind in KINDS if kind != ("encoder", "inspect")])
def test_who_predicts_no_next_word_is_refused(name, verb, folders, tmp_path, capsys):
    options = {"tune": [str(tmp_path / "run")], "inspect": ["--prompt", "the"]}.get(verb, [])
    words = {
        "masked": ("BertForMaskedLM, which is no causal language model", "fill-mask"),
        "encoder": ("BertLMHeadModel sees the words that it would have to predict", "is_decoder=True"),
        "vit": ("ViTForImageClassification, which is no causal language model", "evaluate-images"),
    }
    refused([verb, folders[name], *options], capsys, *words[name])


@pytest.mark.parametrize("command", [["bench", "record", "vit", "x"], ["bench", "model", "vit"], ["play", "vit"]])
def test_no_verb_calls_a_model_of_another_kind_damaged(command, folders, tmp_path, capsys):
    refused([folders.get(word, word) for word in command], capsys, "ViTForImageClassification, which is no causal")


def test_a_masked_model_stays_one(folders, text, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert run(["convert", folders["masked"], out, "--text", text, "--tokens", "512"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    assert type(store.load(out)).base_model_class is t.BertForMaskedLM
    assert run(["inspect", out, "--text", text, "--tokens", "100", "--terminal"]) == 0
    assert run(["fill-mask", out, "the [MASK] of the union"]) == 0
    refused(["convert", folders["vit"], str(tmp_path / "vit")], capsys, "ViTForImageClassification", "in Python")


@pytest.mark.parametrize("model_class", [t.BertModel, t.LlamaModel])
def test_a_model_without_a_head_stays_one(model_class, text, tmp_path, capsys):
    sizes = LLAMA | {"tie_word_embeddings": True} if model_class is t.LlamaModel else BERT
    bare = saved(model_class(model_class.config_class(**sizes)), tmp_path / "bare")
    out = str(tmp_path / "out")
    assert run(["convert", bare, out, "--text", text, "--tokens", "512"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [model_class.__name__]
    assert type(store.load(out)).base_model_class is model_class
    assert run(["inspect", out, "--text", text, "--tokens", "100", "--terminal"]) == 0
    said(capsys)


# Texts.


def test_records_are_read_by_their_field(folders, text, tmp_path):
    lines = PROSE.split(". ")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"id": 1, "text": line + ". "}) for line in lines))
    (tmp_path / "data.txt").write_text("</s>".join(line + ". " for line in lines))
    rows = [
        table_of([folders["llama"]], str(tmp_path / f"data.{kind}"), tmp_path)["rows"][0] for kind in ("jsonl", "txt")
    ]
    assert rows[0]["perplexity_value"] == pytest.approx(rows[1]["perplexity_value"])


# Checks come before work.


def no_work(monkeypatch):
    """Nothing may be tokenized or loaded from here on."""

    def fail(*_args, **_kwargs):
        raise AssertionError("work began before the check")

    for place in ("mixhead.store.load_as", "mixhead.data.windows.token_stream"):
        monkeypatch.setattr(place, fail)


def test_a_run_that_exists_is_refused_before_anything_is_read(folders, text, tmp_path, capsys, monkeypatch):
    command = ["tune", folders["llama"], str(tmp_path / "run"), "--text", text, "--tokens", "128", "--window", "32"]
    assert run([*command, "--batch-size", "2", "--no-bf16"]) == 0
    no_work(monkeypatch)
    refused(command, capsys, "holds a run already")


def damaged(folder, tmp_path):
    """A copy whose weights are cut short."""
    copied = shutil.copytree(folder, tmp_path / "damaged")
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return str(copied)


def test_a_second_model_that_is_cut_short_is_refused_before_the_first_is_measured(
    folders, tmp_path, capsys, monkeypatch
):
    second = damaged(folders["llama"], tmp_path)
    no_work(monkeypatch)
    refused(["evaluate", folders["llama"], second], capsys, "model.safetensors is truncated or corrupt")


def test_a_text_that_is_too_short_for_one_of_the_models_is_refused_before_any_is_measured(
    folders, tmp_path, capsys, monkeypatch
):
    """In the words of the second tokenizer it fills no window, and of questions it has none."""
    (tmp_path / "short.txt").write_text(PROSE[:80])
    monkeypatch.setattr("mixhead.store.load_as", None)
    command = ["evaluate", folders["coarse"], folders["llama"], "--text", tmp_path / "short.txt"]
    refused([*command, "--window", "62"], capsys, "fewer than one window of 62")
    refused([*command, "--window", "16", "--tasks", "4"], capsys, "The text gives no question")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["nowhere"], "There is no model folder nowhere"),
        (["vit"], "no causal language model"),
        (["encoder"], "sees the words"),
        (["--json", "no/where.json"], "there is no folder"),
        (["--text", "nowhere.txt"], "There is no text file"),
    ],
)
def test_evaluation_looks_at_everything_first(options, word, folders, capsys, monkeypatch):
    no_work(monkeypatch)
    refused(["evaluate", folders["llama"], *(folders.get(option, option) for option in options)], capsys, word)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--layer", "7"], "No layer '7' routes: choose one of 0, 1."),
        (["--plot", "a.bmp"], "is written as .png, .svg, .pdf"),
        (["--plot", "a.png", "--figure", "none"], "There is no figure 'none'"),
        (["--figure", "loads"], "give --plot FILE too"),
        (["--plot", "a.png", "--by", "class"], "not grouped by 'class'"),
        (["--out", "no/where.html"], "there is no folder"),
    ],
)
def test_inspection_refuses_what_cannot_be_shown_before_it_records(
    options, word, folders, text, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mixhead.inspect.record.record_routing", None)
    refused(["inspect", folders["routed"], "--text", text, *options], capsys, word)


def test_what_stands_already_is_not_overwritten(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["inspect", folders["routed"], "--prompt", "the", "--tokens", "2"]
    wanted = ["--out", "page.html", "--plot", "loads.png", "--save", "kept"]
    assert run([*command, *wanted]) == run(command) == 0
    written = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(written) == 5
    for options in ([], *(wanted[place : place + 2] for place in (0, 2, 4))):
        refused([*command, *options], capsys, "--overwrite")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == written
    assert run([*command, *wanted, "--overwrite"]) == 0
    refused(["convert", folders["llama"], folders["gpt2"]], capsys, "--overwrite")
    refused(["convert", folders["llama"], folders["llama"], "--overwrite"], capsys, "would be lost")
    refused(["vocabulary", folders["llama"], "a.txt"], capsys, "--overwrite")


def test_a_model_without_heads_is_measured_and_writes(text, tmp_path):
    mamba = t.MambaForCausalLM(t.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, state_size=8))
    folder = saved(mamba, tmp_path / "mamba")
    [row] = table_of([folder], text, tmp_path)["rows"]
    assert row["heads"] == 0 and row["perplexity_value"] > 1
    assert run(["generate", folder, "--prompt", "the", "--max-new-tokens", "3"]) == 0


def test_a_model_that_fills_no_gaps(folders, capsys):
    refused(["fill-mask", folders["llama"], "the [MASK]"], capsys, "holds LlamaForCausalLM, which fills no gaps")
