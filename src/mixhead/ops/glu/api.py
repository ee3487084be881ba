"""`convolutional_glu`: the gated activation of an image model, whose gates see their neighbours on the map.

Shape legend: B batch, N = Y * X tokens of a map, M channels, K = 2 M channels of gates and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.ops.choice import Choice
from mixhead.ops.crossover.rulings import What, ruling
from mixhead.ops.engine import asked_for
from mixhead.ops.glu.engines import GLU_IMPLEMENTATIONS


def convolutional_glu(
    hidden_BNK: Tensor,
    bias_K: Tensor,
    weight_M33: Tensor,
    conv_bias_M: Tensor,
    *,
    size: tuple[int, int],
    impl: str = "auto",
) -> Tensor:
    """gelu(depthwise convolution of the gates) * values (the convolutional GLU of TransNeXt, arXiv 2311.17132).

    Args:
        hidden_BNK: gates, then values, of every token of a map, row by row: a projection without its bias.
        bias_K: the bias of that projection, which is added here, in the same pass.
        weight_M33: taps of each channel's 3 x 3 convolution; beyond its edges the map is 0.
        conv_bias_M: bias of the convolution.
        size: rows Y and columns X of the map.
        impl: "auto" or one of `GLU_IMPLEMENTATIONS`.

    Returns:
        [B, N, M] in the dtype of `hidden_BNK`.

    Raises:
        MixheadError: where shapes or the name of the implementation do not fit, or where the implementation that was
            asked for cannot take these arguments here.
    """
    check(hidden_BNK, bias_K, weight_M33, conv_bias_M, size)
    if impl == "auto":
        engine = GLU_IMPLEMENTATIONS[explain_glu(hidden_BNK).impl]
    else:
        engine = asked_for(impl, GLU_IMPLEMENTATIONS, hidden_BNK)
    return engine.run(hidden_BNK, bias_K, weight_M33, conv_bias_M, size)


def explain_glu(hidden_BNK: Tensor) -> Choice:
    """Which implementation `impl="auto"` takes for these hidden states, and why."""
    why = GLU_IMPLEMENTATIONS["cpu"].refusal(hidden_BNK)
    if why is None:
        what = What(hidden_BNK.dtype, torch.is_grad_enabled() and hidden_BNK.requires_grad)
        limit, why = ruling("glu", "cpu", what, hidden_BNK.shape[2] // 2, hidden_BNK.shape[1])
        if limit >= 1.0:
            return Choice("cpu", why)
    return Choice("reference", f"{why}; plain PyTorch does the same in five passes")


def check(hidden_BNK: Tensor, bias_K: Tensor, weight_M33: Tensor, conv_bias_M: Tensor, size: tuple[int, int]) -> None:
    """Raises a `MixheadError` that names the argument, the expected shape and the one received."""
    if hidden_BNK.dim() != 3 or conv_bias_M.dim() != 1:
        raise MixheadError(
            "hidden_BNK must be [batch, tokens, 2 channels] and conv_bias_M [channels], got "
            f"{list(hidden_BNK.shape)} and {list(conv_bias_M.shape)}."
        )
    channels, (rows, columns) = conv_bias_M.shape[0], size
    expected = {
        "hidden_BNK": (hidden_BNK, (hidden_BNK.shape[0], rows * columns, 2 * channels)),
        "bias_K": (bias_K, (2 * channels,)),
        "weight_M33": (weight_M33, (channels, 3, 3)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise MixheadError(
                f"{name} must be {list(shape)} for {channels} channels and a map of {rows} x {columns}, got "
                f"{list(tensor.shape)}."
            )
