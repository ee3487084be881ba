"""The middle of a convolutional GLU as an operator of PyTorch: schemas, fake tensors and autograd.

The compiled library adds the computation, `source/convolutional_glu.h` tells how it works. Only the inputs are kept for
the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixhead.ops.cpu.usable import unusable

DTYPES = (torch.float32, torch.bfloat16)

INPUTS = "Tensor hidden, Tensor bias, Tensor weight, Tensor conv_bias, int rows"
torch.library.define("mixhead::convolutional_glu_cpu", f"({INPUTS}) -> Tensor")
torch.library.define(
    "mixhead::convolutional_glu_cpu_backward",
    f"(Tensor grad, {INPUTS}) -> (Tensor dhidden, Tensor dbias, Tensor dweight, Tensor dconv_bias)",
)


def refusal(hidden_BNK: Tensor) -> str | None:
    """Why the kernel cannot take these arguments, in a sentence; None where it can. May build the kernel."""
    if hidden_BNK.device.type != "cpu":
        return f"the kernel runs on the CPU, and the hidden states are on {hidden_BNK.device.type}"
    if hidden_BNK.dtype not in DTYPES:
        return f"the kernel takes float32 and bfloat16, not {hidden_BNK.dtype}"
    if hidden_BNK.numel() == 0:
        return "there is nothing to compute"
    return unusable("convolutional_glu")


def glu(hidden_BNK: Tensor, bias_K: Tensor, weight_M33: Tensor, conv_bias_M: Tensor, size: tuple[int, int]) -> Tensor:
    """See `mixhead.ops.convolutional_glu`. The kernel must be built, and `refusal` must be None."""
    parameters = (bias_K.float(), weight_M33.float(), conv_bias_M.float())
    return torch.ops.mixhead.convolutional_glu_cpu(hidden_BNK, *parameters, size[0])


@torch.library.register_fake("mixhead::convolutional_glu_cpu")
def glu_fake(hidden: Tensor, bias: Tensor, weight: Tensor, conv_bias: Tensor, rows: int) -> Tensor:
    """Shape of the output."""
    return hidden.new_empty(*hidden.shape[:2], conv_bias.shape[0])


@torch.library.register_fake("mixhead::convolutional_glu_cpu_backward")
def backward_fake(
    grad: Tensor, hidden: Tensor, bias: Tensor, weight: Tensor, conv_bias: Tensor, rows: int
) -> tuple[Tensor, ...]:
    """Shapes of the gradients."""
    return tuple(t.new_empty(t.shape) for t in (hidden, bias, weight, conv_bias))


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the inputs."""
    *tensors, ctx.rows = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the hidden states and the parameters."""
    return *torch.ops.mixhead.convolutional_glu_cpu_backward(grad, *ctx.saved_tensors, ctx.rows), None


def no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    """Raises: the kernel has no formula for it."""
    raise NotImplementedError("The CPU kernel has no second derivative. Pass impl='reference'.")


torch.library.register_autograd("mixhead::convolutional_glu_cpu", backward, setup_context=save_for_backward)
torch.library.register_autograd("mixhead::convolutional_glu_cpu_backward", no_second_derivative)
