"""A model folder is complete or absent, and whatever is wrong with one is said in a sentence."""

import copy
import errno
import json
import pickle
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GgufConfig, PreTrainedTokenizerFast
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer
from zoo import ZOO, answer, same_bits, tokens

import mixhead
from mixhead import MixheadError, MoHConfig, store
from mixhead.models.moa import MoAEncoderConfig, MoAForMaskedLM
from mixhead.models.moh_dit import MoHDiT, MoHDiTConfig
from mixhead.models.moh_vit import MoHTransNeXtConfig, MoHTransNeXtForImageClassification
from mixhead.processes import this_process


def tokenizer():
    words = Tokenizer(models.WordLevel({"<pad>": 0, "head": 1, "mix": 2}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<pad>")


def converted(name="llama", **config):
    return mixhead.convert(ZOO[name].make(), MoHConfig(**{"active": 0.5, "shared": 0.25, **config}))


def everything(folder: Path):
    """All files under a folder, hidden ones too, with their bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    store.save(converted(), tokenizer(), path)
    return path


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "clip", "whisper"])
def test_what_is_saved_is_loaded_whatever_its_architecture(name, tmp_path):
    for path, model in ((tmp_path / "dense", ZOO[name].make()), (tmp_path / "converted", converted(name))):
        store.save(model, None, path)
        loaded = store.load(path)
        assert type(loaded) is type(model)
        assert not loaded.training
        assert same_bits(answer(ZOO[name], loaded), answer(ZOO[name], model))


def test_a_language_model_comes_with_its_tokenizer(folder):
    model, loaded = store.load_causal_lm(folder)
    assert same_bits(answer(ZOO["llama"], model), answer(ZOO["llama"], store.load(folder)))
    assert loaded("mix head")["input_ids"] == [2, 1]
    assert store.load_tokenizer(folder).pad_token == "<pad>"


def test_only_complete_folders_have_a_name(folder):
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    (folder.parent / "neighbour").mkdir()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((folder.parent / "neighbour").stat().st_mode)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert {*modes.values()} == {modes["config.json"]}, "weights may be read by whom the configuration may"


@pytest.mark.parametrize("name", ["converted", "moh_vit", "moa", "moh_dit"])
def test_weights_that_a_model_saves_itself_may_be_read_too(name, tmp_path):
    if name == "converted":
        model = converted()
    elif name == "moa":
        model = MoAForMaskedLM(MoAEncoderConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1))
    elif name == "moh_vit":
        model = MoHTransNeXtForImageClassification(
            MoHTransNeXtConfig(
                image_size=16, patch_size=4, hidden_sizes=[8], num_heads=[2], depths=[1], mlp_ratios=[2],
                pool_ratios=[1], shared_heads=[1], top_k=[1],
            )
        )  # fmt: skip
    else:
        pytest.importorskip("diffusers")
        from mixhead.models.moh_dit import MoHDiTTransformer2DModel

        sizes = {"sample_size": 8, "in_channels": 3, "hidden_size": 24, "depth": 1, "num_heads": 2, "num_classes": 2}
        model = MoHDiTTransformer2DModel.from_dit(MoHDiT(MoHDiTConfig(**sizes)))
    model.save_pretrained(tmp_path)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert {*modes.values()} == {modes["config.json"]} and any(name.endswith(".safetensors") for name in modes)


def test_a_save_that_was_killed_between_its_two_renamings_loses_nothing(folder, caplog):
    """As a process leaves it that ended when the old folder was away and the new one not yet in its place."""
    before = everything(folder)
    process = this_process().rpartition(".")[0] + ".1"  # of the same number, begun at another time
    folder.rename(folder.with_name(f".{folder.name}-{process}-abc.former"))
    folder.with_name(f".{folder.name}-{process}-abc.partial").mkdir()
    store.load(folder)
    assert everything(folder) == before and "what stood there before is back" in caplog.text
    store.save(converted(), None, folder, overwrite=True)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_folders_in_between_are_made(tmp_path):
    store.save(converted(), None, tmp_path / "a" / "b")
    store.load(tmp_path / "a" / "b")


def test_an_empty_folder_is_taken(tmp_path):
    store.save(converted(), None, tmp_path)
    store.load(tmp_path)


def test_a_folder_with_something_in_it_is_not_touched(folder):
    before = everything(folder.parent)
    with pytest.raises(MixheadError, match="exists and is not empty: name another folder"):
        store.save(converted(router="query_norm"), None, folder)
    assert everything(folder.parent) == before


def from_gguf(model, packed=()):
    """The model as transformers leaves it after loading a GGUF file: weights are unpacked where it has no kernel."""
    model.hf_quantizer = GgufHfQuantizer(GgufConfig(dequantize=not packed))
    model.hf_quantizer.packed_modules = dict.fromkeys(packed)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    model.is_quantized, model.quantization_method = True, "gguf"
    return model


def test_a_model_of_a_gguf_file_is_saved_as_the_plain_model_that_it_is(tmp_path):
    model = from_gguf(ZOO["llama"].make())
    store.save(model, None, tmp_path / "dense")
    converted = mixhead.convert(from_gguf(model), MoHConfig(active=0.5, router="query_norm"))
    store.save(converted, None, tmp_path / "converted")
    for name, expected in (("dense", mixhead.revert(copy.deepcopy(converted))), ("converted", converted)):
        loaded = store.load(tmp_path / name)
        assert "gguf" not in (tmp_path / name / "config.json").read_text()
        ids = tokens()
        assert torch.equal(loaded.eval()(ids).logits, expected.eval()(ids).logits)


def test_weights_that_have_no_form_in_a_file_are_refused_in_a_sentence(tmp_path):
    model = from_gguf(ZOO["llama"].make(), packed=["lm_head.weight"])
    with pytest.raises(MixheadError, match=r"This LlamaForCausalLM cannot be saved .* dequantize=True"):
        store.save(model, None, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_overwriting_replaces_the_whole_folder(folder):
    store.save(converted(router="query_norm"), None, folder, overwrite=True)
    assert store.load(folder).config.moh["router"] == "query_norm"
    assert not (folder / "tokenizer.json").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_overwriting_never_deletes_what_is_no_model(tmp_path):
    (tmp_path / "diary.txt").write_text("years of work")
    with pytest.raises(
        MixheadError, match=r"holds no model \(config\.json is missing\), so it will not be overwritten"
    ):
        store.save(converted(), None, tmp_path, overwrite=True)
    assert (tmp_path / "diary.txt").read_text() == "years of work"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MixheadError, match="exists and is a file"):
        store.save(converted(), None, tmp_path / "file", overwrite=True)
    with pytest.raises(MixheadError, match=r"cannot be made, since .*file is a file: name a folder elsewhere"):
        store.save(converted(), None, tmp_path / "file" / "below")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_nothing_half_written_and_loses_nothing(error, overwrite, tmp_path, monkeypatch):
    path = tmp_path / "model"
    if overwrite:
        store.save(converted(), tokenizer(), path)
    before = everything(tmp_path)

    def half_written(_, file, *args, **kwargs):
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", half_written)
    with pytest.raises(MixheadError, match=r"could not be written: .*No space left on device\. Nothing of it was left"):
        store.save(converted(router="query_norm"), None, path, overwrite=overwrite)
    assert everything(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == (["model"] if overwrite else [])


def test_an_interruption_leaves_nothing_half_written(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.save(converted(), None, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_where_the_last_renaming_fails_the_former_model_comes_back(folder, monkeypatch):
    before = everything(folder.parent)
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(MixheadError, match="could not be written: Input/output error"):
        store.save(converted(router="query_norm"), None, folder, overwrite=True)
    assert everything(folder.parent) == before


def truncate(file: Path, keep: float):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])


def edit(file: Path, **changes):
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def described(folder: Path, **changes):
    moh = json.loads((folder / "config.json").read_text())["moh"]
    edit(folder / "config.json", moh={**moh, **changes})


DAMAGES = {
    "no folder": (lambda f: shutil.rmtree(f), "There is no model folder"),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"is no model folder: config\.json is missing"),
    "empty configuration": (lambda f: (f / "config.json").write_text(""), r"config\.json is truncated or corrupt"),
    "half a configuration": (lambda f: truncate(f / "config.json", 0.5), r"config\.json is truncated or corrupt"),
    "binary configuration": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "truncated or corrupt"),
    "a list as configuration": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "lists without end": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        r"config\.json is truncated or corrupt",
    ),
    "objects without end": (
        lambda f: (f / "config.json").write_text('{"moh": ' + '{"a": ' * 900 + "1" + "}" * 901),
        "does not say which model",
    ),
    "a weight in another folder": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x/model.safetensors"}}'),
        "nothing outside of the folder is read",
    ),
    "a list as index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "must hold a JSON object"),
    "a list of weights as index": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'),
        "has no weight_map",
    ),
    "no model type": (lambda f: edit(f / "config.json", model_type=...), "does not say which model"),
    "unknown model type": (lambda f: edit(f / "config.json", model_type="unheard"), "describes no model that can be"),
    "no way to routed weights": (lambda f: edit(f / "config.json", quantization_config=...), "a mixhead checkpoint"),
    "no description of the heads": (lambda f: edit(f / "config.json", moh=...), "does not say which heads"),
    "nonsense about the heads": (lambda f: edit(f / "config.json", moh={"layers": 3}), "does not say which heads"),
    "too few layers described": (
        lambda f: edit(f / "config.json", moh={**json.loads((f / "config.json").read_text())["moh"], "layers": []}),
        "describes 0 attention layers, but the model has 2",
    ),
    "another router": (lambda f: described(f, router=["linear"]), "does not say which heads"),
    "a word as a number": (lambda f: described(f, balance_coefficient="much"), "does not say which heads"),
    "no sign of a converted model": (
        lambda f: edit(f / "config.json", quantization_config=..., transformers_weights=...),
        "says which heads each layer uses",
    ),
    "a number as architecture": (lambda f: edit(f / "config.json", architectures=[5]), "a list of names"),
    "a name as architectures": (lambda f: edit(f / "config.json", architectures="Llama"), "a list of names"),
    "another architecture": (lambda f: edit(f / "config.json", architectures=["MoHGhost"]), "names MoHGhost"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "is empty: download it again"),
    "weights cut in the header": (lambda f: truncate(f / "model.safetensors", 0.01), "truncated or corrupt"),
    "weights cut in the data": (lambda f: truncate(f / "model.safetensors", 0.9), "truncated or corrupt"),
    "random weights file": (lambda f: (f / "model.safetensors").write_bytes(bytes(range(256)) * 99), "corrupt"),
    "a pointer instead of weights": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "Git LFS pointer",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(damage, folder):
    do, match = DAMAGES[damage]
    do(folder)
    with pytest.raises(MixheadError, match=match) as raised:
        store.load(folder)
    assert str(raised.value).endswith(".")
    assert "\n" not in str(raised.value)


def test_a_missing_shard(tmp_path):
    converted().save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(MixheadError, match=r"is incomplete: model\.safetensors\.index\.json names model-00002"):
        store.load(tmp_path)


def test_weights_that_do_not_belong_to_the_configuration(folder, tmp_path):
    dense = tmp_path / "dense"
    store.save(ZOO["llama"].make(), None, dense)
    shutil.copy(dense / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(
        MixheadError, match=r"do not fit its config\.json: missing model\.layers\.0\.self_attn\.moh_router"
    ):
        store.load(folder)


def test_a_pickle_that_tries_to_execute_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    folder = tmp_path / "model"
    store.save(ZOO["llama"].make(), None, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(MixheadError, match="cannot be loaded"):
        store.load(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(MixheadError, match="cannot be loaded"):
        store.load(folder)
    assert not (tmp_path / "executed").exists()


def test_code_that_comes_with_a_folder_is_not_executed(folder, tmp_path):
    (folder / "code.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'executed')!r}).touch()")
    edit(folder / "config.json", model_type="ghost", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(MixheadError, match="describes no model that can be loaded"):
        store.load(folder)
    assert not (tmp_path / "executed").exists()


def test_a_folder_without_a_tokenizer(tmp_path):
    store.save(converted(), None, tmp_path)
    with pytest.raises(MixheadError, match="has no tokenizer that can be read"):
        store.load_causal_lm(tmp_path)


def test_a_damaged_tokenizer(folder):
    truncate(folder / "tokenizer.json", 0.5)
    with pytest.raises(MixheadError, match="has no tokenizer that can be read"):
        store.load_tokenizer(folder)


def test_a_model_that_writes_no_text_is_no_language_model(tmp_path):
    store.save(ZOO["vit"].make(), tokenizer(), tmp_path)
    with pytest.raises(MixheadError, match="ViTForImageClassification, which is no causal language model"):
        store.load_causal_lm(tmp_path)
