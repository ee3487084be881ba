"""The published folder of MoH-LLaMA3, at a tiny size: read whole, in shards, and refused where it is damaged."""

import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_llama import TINY, stock_llama, tokens
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import mixhead
from mixhead.errors import MixheadError
from mixhead.interop import from_official, is_published_moh_llama, load_moh_llama, published_llama
from mixhead.interop.llama import empty_moh_llama, llama_settings
from mixhead.models.hugging_face import MoHModelMixin

# As the published configuration stands, at a tiny size: nothing in it tells that heads are chosen.
PUBLISHED = {
    **TINY,
    "architectures": ["LlamaForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"},
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "num_hidden_layers": 32,
    "rotary_percent": 1.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "transformers_version": "4.33.1",
    "rope_theta": 500000,
}


def split(weights: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """One shard for every layer and one for the rest, 33 for 32 layers."""
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(layers + 1)]
    for name, tensor in weights.items():
        shards[int(name.split(".")[2]) if name.startswith("model.layers.") else layers][name] = tensor
    return shards


def write_shards(folder: Path, weights: dict[str, torch.Tensor], form: str) -> None:
    shards = split(weights)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"pytorch_model-{number:05}-of-{len(shards):05}.{form}"
        if form == "bin":
            torch.save(shard, folder / file)
        else:
            save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    index = "pytorch_model.bin.index.json" if form == "bin" else "model.safetensors.index.json"
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / index).write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """(folder with 33 .bin shards, the weights in it)."""
    folder = tmp_path_factory.mktemp("published")
    stock = stock_llama(num_hidden_layers=32, rope_theta=500000.0, initializer_range=0.1)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in stock.state_dict().items()}
    write_shards(folder, weights, "bin")
    (folder / "config.json").write_text(json.dumps(PUBLISHED), encoding="utf-8")
    settings = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "temperature": 0.6,
        "transformers_version": "4",
    }
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    code = f"routed_head = 8\nopen({str(folder / 'executed')!r}, 'w')\n"
    (folder / "modeling_llama.py").write_text(code, encoding="utf-8")
    return folder, weights


@pytest.fixture
def folder(published, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(published[0], tmp_path / "folder"))


def shard(folder: Path, number: int) -> Path:
    return folder / f"pytorch_model-{number:05}-of-00033.bin"


def test_published_sizes():
    """The published model has the 291 weights of a stock LLaMA, 8,297,648,128 parameters, and 24 of 32 heads active."""
    sizes = {
        "vocab_size": 160896,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    }
    settings, heads = llama_settings({**PUBLISHED, **sizes})
    model = empty_moh_llama(settings, heads)
    assert (heads.active_heads, heads.shared_heads) == (24, 16)
    assert len(list(model.parameters())) == 291
    assert model.num_parameters() == 8_297_648_128


def test_published_folder_routes(published):
    folder, weights = published
    done = []
    model = load_moh_llama(folder, on_shard=lambda *progress: done.append(progress))
    assert done == [(number, 33) for number in range(1, 34)]
    assert isinstance(model, MoHModelMixin)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.generation_config.eos_token_id == 2
    with mixhead.keep_routing(model) as log, torch.no_grad():
        logits = model(tokens()).logits
    assert len(log.layers) == 32
    for _, routing in log.layers:
        assert routing.selected_BNH[..., :4].all()
        assert (routing.selected_BNH.sum(-1) == 6).all()
    config = {**TINY, "num_hidden_layers": 32, "rope_theta": 500000.0}
    assert torch.equal(logits, from_official("moh_llama", config, weights)(tokens()).logits)
    assert not (folder / "executed").exists()


def test_other_forms_give_the_same_model(published, tmp_path):
    folder, weights = published
    expected = load_moh_llama(folder, dtype="float32")
    assert expected.dtype == torch.float32
    for form in ("shards", "single"):
        other = tmp_path / form
        other.mkdir()
        config = {name: value for name, value in PUBLISHED.items() if name != "torch_dtype"}
        (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if form == "shards":
            write_shards(other, weights, "safetensors")
        else:
            torch.save({**weights, "model.rotary_emb.inv_freq": torch.ones(2)}, other / "pytorch_model.bin")
        assert load_moh_llama(other).dtype == torch.bfloat16  # that of the file, where config.json names none
        model = load_moh_llama(str(other), dtype=torch.float32)
        assert torch.equal(model(tokens()).logits, expected(tokens()).logits)


def test_one_shard_at_a_time_is_alive(published, monkeypatch):
    alive = []
    load = published_llama.load_pickle_weights

    def watched(path, **kwargs):
        weights = load(path, **kwargs)
        assert not any(reference() is not None for reference in alive)
        alive[:] = [weakref.ref(tensor) for tensor in weights.values()]
        return weights

    monkeypatch.setattr(published_llama, "load_pickle_weights", watched)
    load_moh_llama(published[0])
    assert not any(reference() is not None for reference in alive)


def test_links_of_the_hub_cache_are_followed(published, tmp_path):
    for file in published[0].iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert load_moh_llama(tmp_path).num_parameters() == sum(t.numel() for t in published[1].values())


def test_saved_as_a_mixhead_checkpoint(published, tmp_path):
    model = load_moh_llama(published[0])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "moh" in config
    assert "auto_map" not in json.dumps(config)
    assert not is_published_moh_llama(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert type(again) is type(model)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    with pytest.raises(MixheadError, match="mixhead checkpoint already"):
        load_moh_llama(tmp_path)
    stock = mixhead.revert(model)
    assert type(stock) is LlamaForCausalLM


def test_detection(folder, tmp_path):
    assert is_published_moh_llama(folder)
    (folder / "modeling_llama.py").unlink()
    assert is_published_moh_llama(str(folder))
    (folder / "modeling_llama.py").write_text("class LlamaForCausalLM: ...", encoding="utf-8")
    assert not is_published_moh_llama(folder)
    stock = {name: value for name, value in PUBLISHED.items() if name != "auto_map"}
    for text in (json.dumps(stock), "[]", "{", "", json.dumps({**PUBLISHED, "auto_map": "modeling_llama"})):
        (folder / "config.json").write_text(text, encoding="utf-8")
        assert not is_published_moh_llama(folder)
    assert not is_published_moh_llama(tmp_path / "absent")


def edit_index(folder: Path, **changes) -> None:
    index = folder / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"].update({name.replace("__", "."): file for name, file in changes.items()})
    index.write_text(json.dumps(content), encoding="utf-8")


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def flip(file: Path) -> None:
    """Changes one byte of a weight."""
    content = bytearray(file.read_bytes())
    weight = next(iter(torch.load(file, weights_only=True).values()))
    content[content.find(weight.view(torch.uint8).numpy().tobytes()) + 5] ^= 1
    file.write_bytes(content)


class Hostile:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def remove_all(folder: Path) -> None:
    for file in folder.glob("pytorch_model*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: shard(f, 7).unlink(), "lacks 1 of the 33 files .*00007-of-00033"),
        (lambda f: cut(shard(f, 3), 0.5), "00003-of-00033.bin is truncated or corrupt"),
        (lambda f: cut(shard(f, 33), 0.999), "00033-of-00033.bin is truncated or corrupt"),
        (lambda f: shard(f, 2).write_bytes(b""), "00002-of-00033.bin is empty"),
        (lambda f: shard(f, 2).write_text("<html>Not found</html>"), "is no file of weights"),
        (lambda f: shard(f, 2).write_text("version https://git-lfs.github.com/spec/v1"), "Git LFS pointer"),
        (lambda f: flip(shard(f, 5)), "00005-of-00033.bin is truncated or corrupt"),
        (lambda f: torch.save({"a": Hostile(f / "executed")}, shard(f, 4)), "refused.*nothing in it was executed"),
        (lambda f: shutil.copy(shard(f, 1), shard(f, 2)), "lacks weights that the index looks for there"),
        (lambda f: torch.save({**torch.load(shard(f, 1)), "x": torch.ones(1)}, shard(f, 1)), "does not name: x"),
        (lambda f: edit_index(f, model__norm__weight="../../secret.bin"), "no plain name of a file"),
        (lambda f: edit_index(f, model__norm__weight="/etc/passwd"), "no plain name of a file"),
        (lambda f: edit_index(f, model__norm__weight=".."), "no plain name of a file"),
        (lambda f: edit_index(f, model__norm__weight="..\\secret.bin"), "no plain name of a file"),
        (lambda f: edit_index(f, model__norm__weight=7), "no plain name of a file"),
        (lambda f: edit_index(f, model__layers__40__mlp__weight=shard(f, 1).name), "weights of 41 layers"),
        (lambda f: edit_index(f, router__weight=shard(f, 1).name), "The index does not fit .*unexpected router.weight"),
        (lambda f: (f / "pytorch_model.bin.index.json").write_text("{}"), "has no weight_map"),
        (lambda f: cut(f / "pytorch_model.bin.index.json", 0.5), "truncated or corrupt"),
        (lambda f: cut(f / "config.json", 0.5), "truncated or corrupt"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "truncated or corrupt"),
        (lambda f: (f / "config.json").write_text("[1]"), "must hold a JSON object"),
        (lambda f: (f / "config.json").unlink(), "There is no file"),
        (lambda f: (f / "config.json").write_text(json.dumps({**PUBLISHED, "vocab_size": 41})), r"must be \[41, 32\]"),
        (lambda f: (f / "config.json").write_text(json.dumps({**PUBLISHED, "torch_dtype": "int8"})), "dtype=int8"),
        (lambda f: (f / "generation_config.json").write_text('{"max_new_tokens": -1}'), "defaults of generation"),
        (remove_all, "holds no weights"),
        (shutil.rmtree, "There is no folder"),
    ],
)
def test_damaged_folders_are_refused(folder, damage, sentence):
    damage(folder)
    with pytest.raises(MixheadError, match=sentence):
        load_moh_llama(folder)
    assert not (folder / "executed").exists()
