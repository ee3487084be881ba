"""MoH-LLaMA: the official code's results from its weights, and the published folder's layout in a tiny copy."""

import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mixhead
from mixhead.errors import MixheadError
from mixhead.interop import from_official, is_published_moh_llama, load_moh_llama, published_llama
from mixhead.interop.llama import empty_moh_llama, llama_settings
from mixhead.models.hugging_face import MoHModelMixin

TOLERANCE = 1e-5
TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
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


def stock_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, "initializer_range": 0.3, **changes}))
    return model.eval()


def tokens(batch=2, length=9) -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(2))


def largest_difference(a, b) -> float:
    return (a.float() - b.float()).abs().max().item()


# The golden case.


@pytest.fixture
def case(golden):
    return golden("moh_llama_model")


@pytest.fixture
def model(case):
    return from_official("moh_llama", case.entry, case.state_dict)


@torch.no_grad()
def test_golden_logits(model, case):
    assert largest_difference(model(case["input_ids"]).logits, case["logits"]) <= TOLERANCE
    padded = model(case["input_ids"], attention_mask=case["attention_mask"], position_ids=case["position_ids"]).logits
    real = case["attention_mask"].bool()
    assert largest_difference(padded[real], case["padded_logits"][real]) <= TOLERANCE


@pytest.mark.parametrize("use_cache", [True, False])
def test_golden_generation(model, case, use_cache):
    prompt = case["input_ids"][:, :6]
    settings = {"max_new_tokens": 10, "do_sample": False, "use_cache": use_cache}
    assert torch.equal(model.generate(prompt, **settings), case["greedy"])
    padding = torch.zeros(2, 3, dtype=prompt.dtype)
    padded = torch.cat([padding, prompt], 1)
    mask = torch.cat([padding, torch.ones_like(prompt)], 1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 3:], case["greedy"])


def test_flat_configuration_and_published_rule(model, case):
    flat = {**case.config, "shared_heads": case.entry["shared_heads"], "top_k": case.entry["top_k"]}
    expected = model(case["input_ids"]).logits
    for config in (flat, case.config, {"config": case.config}):  # half shared, a quarter routed is the published rule
        other = from_official("moh_llama", config, case.state_dict)
        assert torch.equal(other(case["input_ids"]).logits, expected)
        assert other.config.moh["layers"] == [{"num_heads": 8, "active_heads": 6, "shared_heads": 4}] * 3


def test_every_weight_learns_and_balance_joins_the_loss(model, case):
    ids = case["input_ids"]
    plain = model(ids, labels=ids).loss
    loss = model.train()(ids, labels=ids).loss
    assert loss > plain
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


def test_weights_are_copied(model, case):
    weights = case.state_dict
    model = from_official("moh_llama", case.entry, weights)
    before = model(case["input_ids"]).logits
    for tensor in weights.values():
        tensor.zero_()
    assert torch.equal(model(case["input_ids"]).logits, before)


# Against stock LLaMA.


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope_scaling", [None, {"type": "linear", "factor": 2.0}])
def test_all_heads_active_gives_stock_bits(tied, rope_scaling):
    changes = {"tie_word_embeddings": tied, "rope_theta": 5000.0}
    if rope_scaling is not None:
        changes["rope_scaling"] = rope_scaling
    stock = stock_llama(**changes)
    weights = {**stock.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    config = {**TINY, **changes, "shared_heads": 3, "top_k": 5}
    ours = from_official("moh_llama", config, weights)
    assert torch.equal(ours(tokens()).logits, stock(tokens()).logits)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied
    assert ours.config.rope_parameters["rope_theta"] == 5000.0
    routed = from_official("moh_llama", {**TINY, **changes}, weights)
    assert not torch.allclose(routed(tokens()).logits, stock(tokens()).logits, atol=1e-3)


def test_embeddings_are_tied_where_no_head_is_given():
    stock = stock_llama(tie_word_embeddings=True)
    weights = {name: tensor for name, tensor in stock.state_dict().items() if name != "lm_head.weight"}
    ours = from_official("moh_llama", {**TINY, "shared_heads": 8, "top_k": 0}, weights)
    assert torch.equal(ours(tokens()).logits, stock(tokens()).logits)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_dtype_of_the_weights_is_kept():
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in stock_llama().state_dict().items()}
    model = from_official("moh_llama", TINY, weights)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16
    assert model(tokens()).logits.isfinite().all()


def change_shape(weights):
    weights["model.norm.weight"] = torch.ones(31)


def untie(weights):
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1


@pytest.mark.parametrize(
    ("changes", "damage", "sentence"),
    [
        ({}, lambda w: w.pop("model.norm.weight"), "missing model.norm.weight"),
        ({}, lambda w: w.update({"model.layers.0.self_attn.wg.weight": torch.ones(4, 32)}), "unexpected .*wg.weight"),
        ({}, change_shape, r"must be \[32\], but it is \[31\]"),
        ({}, lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "floating"),
        ({}, lambda w: w.update({"model.norm.weight": [1.0]}), "must be a tensor"),
        ({"tie_word_embeddings": True}, untie, "tie_word_embeddings"),
        ({"tie_word_embeddings": False}, lambda w: w.pop("lm_head.weight"), "missing lm_head.weight"),
        ({"num_hidden_layers": 10**12}, None, "weights of 2 layers"),
        ({"num_hidden_layers": 0}, None, "whole number"),
        ({"hidden_size": "32"}, None, "whole number"),
        ({"vocab_size": None}, None, "does not say vocab_size"),
        ({"num_key_value_heads": 3}, None, "must divide"),
        ({"num_attention_heads": 6}, None, "must be a multiple of num_attention_heads=6"),
        ({"hidden_act": "square-root"}, None, "describes no LLaMA model"),
        ({"shared_heads": 6, "top_k": 3}, None, "at most num_attention_heads=8"),
        ({"shared_heads": 0, "top_k": 0}, None, "at least 1"),
        ({"top_k": 1.5}, None, "whole numbers"),
        ({"model_type": "mistral"}, None, "'mistral'"),
        ({"quantization_config": {"bits": 4}}, None, "quantised"),
        ({"rotary_percent": 0.5}, None, "rotary_percent"),
    ],
)
def test_what_does_not_fit_is_refused(changes, damage, sentence):
    weights = stock_llama().state_dict()
    if damage is not None:
        damage(weights)
    with pytest.raises(MixheadError, match=sentence):
        from_official("moh_llama", {**TINY, "num_key_value_heads": 2, **changes}, weights)


# The published folder.


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
