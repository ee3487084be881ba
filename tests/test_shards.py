"""An index of weights is followed inside its folder alone, and one that is malformed is refused in a sentence."""

import json

import pytest

from mixhead.errors import MixheadError
from mixhead.shards import check_indexes, read_index


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", "[" * 100_000, '{"weight_map": null}', '{"weight_map": []}', '{"weight_map": {}}',
     '{"weight_map": {"a": 7}}', '{"weight_map": {"a": ["x"]}}', '{"weight_map": {"a": null}}'],
)  # fmt: skip
def test_malformed_indexes(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(MixheadError, match=r"model\.safetensors\.index\.json"):
        check_indexes(tmp_path)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "a/b", "..", "", "C:x", "..\\x", "a\0b"])
@pytest.mark.parametrize(
    "index", ["model.safetensors.index.json", "diffusion_pytorch_model.fp16.safetensors.index.json"]
)
def test_nothing_outside_the_folder_is_read(tmp_path, name, index):
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": name}}))
    with pytest.raises(MixheadError, match=r"looks for b in .*nothing outside of the folder is read"):
        check_indexes(tmp_path)


def test_what_an_index_says(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    assert read_index(index) == {"a": "1.safetensors", "b": "2.safetensors"}
    (tmp_path / "1.safetensors").write_bytes(b"x")
    with pytest.raises(MixheadError, match=r"is incomplete: .* names 2\.safetensors, which is not there"):
        check_indexes(tmp_path)
    (tmp_path / "2.safetensors").symlink_to(tmp_path / "1.safetensors")
    check_indexes(tmp_path)
