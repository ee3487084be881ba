"""`mixhead inspect` on tiny models: texts, writing, pictures, recordings, and mistakes that end in a sentence."""

import re

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import mixhead
from mixhead import store
from mixhead.cli.app import run
from mixhead.report.contents import read_contents


@pytest.fixture(scope="module")
def model(tmp_path_factory, talking_llama):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    store.save(*talking_llama, folder)
    return str(folder)


@pytest.fixture
def texts(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"the state of {name} <b>is</b> 😀 strong, {name * 5}", encoding="utf-8")
    return [f"--text=first={tmp_path}/one.txt", f"--text=second={tmp_path}/two.txt"]


def printed(capsys):
    return re.sub(r"\s+", " ", "".join(capsys.readouterr()))


def test_a_page_of_two_texts_and_a_recording_that_is_shown_again(model, texts, tmp_path, capsys):
    kept, page = tmp_path / "kept", tmp_path / "page.html"
    assert run(["inspect", model, *texts, "--out", str(page), "--save", str(kept)]) == 0
    assert "Wrote" in printed(capsys)
    text = page.read_text("utf-8")
    assert "<b>is</b>" not in text
    assert "\\u003cb\\u003e" in text or "\\u003c" in text
    again = tmp_path / "again.html"
    assert run(["inspect", str(kept), "--out", str(again), "--title", "Which heads tiny uses"]) == 0
    assert again.read_text("utf-8") == text
    assert run(["inspect", f"{kept}.safetensors", "--terminal"]) == 0
    shown = printed(capsys)
    assert "Load of every head" in shown
    assert "Text 2 (second)" in shown


def test_generate_and_inspect_say_the_same_share_and_name_the_other(talking_llama, tmp_path, capsys):
    """Layers that use all of their heads do not route, and a recording knows nothing of them."""
    sizes = {"vocab_size": len(talking_llama[1]), "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3, tie_word_embeddings=True))
    mixhead.convert(model, mixhead.MoHConfig(active_heads=[4, 2, 2]))
    store.save(model, talking_llama[1], tmp_path / "model")
    assert run(["generate", str(tmp_path / "model"), "--prompt", "the state", "--max-new-tokens", "3"]) == 0
    assert "8 of 12 heads per token (66.7%) over 3 layers (50.0% in the 2 that route)" in printed(capsys)
    assert run(["inspect", str(tmp_path / "model"), "--prompt", "the state", "--tokens", "3", "--terminal"]) == 0
    assert (
        "2 layers that route, 8 heads; a token uses 4.0 of them (50.0%), and with the 4 heads of layers that do not "
        "route 66.7% of all." in printed(capsys)
    )


@pytest.mark.parametrize("name", ["kept", "kept.safetensors", "kept.json"])
def test_a_recording_is_kept_under_its_name_with_or_without_a_suffix(name, model, tmp_path):
    asked = ["inspect", model, "--prompt", "the state", "--tokens", "3", "--terminal", "--save", str(tmp_path / name)]
    assert run(asked) == 0
    assert sorted(path.name for path in tmp_path.glob("kept*")) == ["kept.json", "kept.safetensors"]
    assert run(["inspect", str(tmp_path / name), "--terminal"]) == 0


def test_the_figure_of_the_paper_is_one_command(model, texts, tmp_path):
    figure = tmp_path / "loads.svg"
    assert run(["inspect", model, *texts, "--plot", str(figure), "--by", "text"]) == 0
    assert "<svg" in figure.read_text("utf-8")
    assert not (tmp_path / "heads.html").exists()


def test_what_it_writes(model, tmp_path):
    page = tmp_path / "page.html"
    assert run(["inspect", model, "--prompt", "the state", "--tokens", "5", "--out", str(page)]) == 0
    assert page.is_file()


def test_a_translator_shows_what_it_reads_and_what_it_writes(model, texts, tmp_path, capsys):
    from mixhead.models.moa import MoATransformerConfig, MoATransformerForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = store.load_tokenizer(model)
    tokenizer.eos_token = tokenizer.pad_token
    config = MoATransformerConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_heads=4, head_dim=4, active_heads=2,
        encoder_layers=1, decoder_layers=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    translator, kept = tmp_path / "translator", tmp_path / "kept"
    store.save(MoATransformerForConditionalGeneration(config).eval(), tokenizer, translator)
    command = ["inspect", str(translator), *texts, "--tokens", "40", "--out", str(tmp_path / "page.html")]
    assert run([*command, "--save", str(kept)]) == 0, printed(capsys)
    recording = mixhead.Recording(kept)
    assert len(recording.same_tokens(recording.layers[0])) == 1  # the encoder; the decoder attends to both texts
    assert len(recording.same_tokens(recording.layers[1])) == 2
    contents = read_contents(recording)
    assert [axis.sequences[0].title for axis in contents.axes] == ["Source 1 (first)", "Written 1 (first)"]
    assert "".join(contents.axes[0].texts).lstrip().startswith("the state of one")
    assert run(["inspect", str(translator), "--prompt", "the"]) == 2
    assert "continues no prompt" in printed(capsys)


def test_pictures_by_class(tmp_path, capsys):
    from mixhead.models.moh_vit import MoHTransNeXtConfig, MoHTransNeXtForImageClassification
    from mixhead.models.moh_vit.images import image_processor

    config = MoHTransNeXtConfig(
        hidden_sizes=(8, 16), num_heads=(2, 4), depths=(1, 1), mlp_ratios=(2, 2), pool_ratios=(2, 1),
        shared_heads=(1, 1), top_k=(1, 2), image_size=32, num_labels=3,
    )  # fmt: skip
    folder = tmp_path / "vit"
    store.save(MoHTransNeXtForImageClassification(config).eval(), image_processor(config), folder)
    for name, colour in (("bag", "red"), ("boat", "blue")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), colour).save(tmp_path / "pictures" / name / "a.png")
    (tmp_path / "pictures" / "boat" / "torn.png").write_bytes(b"no picture")
    page, figure = tmp_path / "page.html", tmp_path / "class.png"
    command = ["inspect", str(folder), "--images", str(tmp_path / "pictures"), "--out", str(page)]
    assert run([*command, "--plot", str(figure), "--by", "class"]) == 0
    text = page.read_text("utf-8")
    assert text.count("data:image/png;base64,") == 2
    assert "Picture 2 (boat)" in text
    assert figure.is_file()
    assert "Left out: The file" in printed(capsys)
    (tmp_path / "pictures" / "boat" / "torn.png").rename(tmp_path / "torn.png")
    assert run(["inspect", str(folder), "--images", str(tmp_path / "torn.png"), "--terminal"]) == 2
    assert "None of the 1 pictures can be read" in printed(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "nowhere.txt"], "There is no text file nowhere.txt"),
        (["--prompt", ""], "The prompt holds no token"),
        (["--prompt", "a", "--images", "x"], "Give one of texts"),
        (["--prompt", "the", "--tokens", "2", "--layer", "7"], "No layer '7' routes: choose one of 0, 1."),
        (["--prompt", "the", "--tokens", "2", "--plot", "a.bmp"], "is written as .png, .svg, .pdf"),
        (["--prompt", "the", "--tokens", "2", "--plot", "a.png", "--by", "class"], "not grouped by 'class'"),
        (["--prompt", "the", "--tokens", "2", "--save", "no/where"], "does not exist: make it first"),
    ],
)
def test_mistakes_end_in_a_sentence(model, options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["inspect", model, *options]) == 2
    assert message in printed(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_is_refused(tmp_path, model, capsys):
    from transformers import AutoModelForCausalLM

    dense = mixhead.revert(AutoModelForCausalLM.from_pretrained(model))
    store.save(dense, store.load_tokenizer(model), tmp_path / "dense")
    assert run(["inspect", str(tmp_path / "dense"), "--prompt", "the", "--tokens", "2"]) == 2
    assert "routes in no layer" in printed(capsys)
