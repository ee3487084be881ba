"""The projections of selected heads as operators of PyTorch: schemas, fake tensors and autograd.

The compiled library adds the computation, `source/projections.h` tells how it works.

Shape legend: B batch, N tokens, H heads, D head dim, C hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixhead.ops.cpu.compiling import available, best_level

torch.library.define(
    "mixhead::project_to_heads_cpu", "(Tensor hidden, Tensor weight, Tensor? bias, Tensor selected) -> Tensor"
)
torch.library.define(
    "mixhead::project_to_heads_cpu_backward",
    "(Tensor grad, Tensor hidden, Tensor weight, Tensor selected) -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
)
torch.library.define(
    "mixhead::project_from_heads_cpu",
    "(Tensor out, Tensor weight, Tensor? bias, Tensor selected, Tensor? gates) -> Tensor",
)
torch.library.define(
    "mixhead::project_from_heads_cpu_backward",
    "(Tensor grad, Tensor out, Tensor weight, Tensor selected, Tensor? gates)"
    " -> (Tensor dout, Tensor dweight, Tensor dgates)",
)

# The instruction sets that the kernel was measured on and was faster than the dense projection.
LEVELS = ("amx", "avx512_bf16", "avx512")


def refusal(rows: Tensor) -> str | None:
    """Why the kernel cannot take these rows, in a sentence; None where it can. May build the kernel."""
    if rows.device.type != "cpu":
        return f"the kernel runs on the CPU, and the rows are on {rows.device.type}"
    if rows.dtype == torch.bfloat16 and best_level() not in ("amx", "avx512_bf16"):
        return "this CPU has no instructions for products in bfloat16"
    if rows.dtype not in (torch.float32, torch.bfloat16):
        return f"the kernel computes in float32 and bfloat16, not in {rows.dtype}"
    built, reason = available()
    return None if built else reason


def pays(dtype: torch.dtype) -> bool:
    """Whether the kernel is faster than one dense product where few heads are selected; nothing is built.

    In bfloat16 the stock product keeps the matrix units so busy that bringing rows together costs more than it saves.
    """
    return dtype == torch.float32 and best_level() in LEVELS


def to_heads(hidden_BNC: Tensor, weight_HDC: Tensor, bias_HD: Tensor | None, selected_BNH: Tensor) -> Tensor:
    """The queries of the selected heads, [B, H, N, D]. The kernel must be built, and `refusal` must be None."""
    return torch.ops.mixhead.project_to_heads_cpu(hidden_BNC, weight_HDC, bias_HD, selected_BNH)


def from_heads(
    out_BHND: Tensor, weight_HDC: Tensor, bias_C: Tensor | None, selected_BNH: Tensor, gates_BNH: Tensor | None
) -> Tensor:
    """The sum over the selected heads, [B, N, C]. The kernel must be built, and `refusal` must be None."""
    gates_BNH = None if gates_BNH is None else gates_BNH.float()
    return torch.ops.mixhead.project_from_heads_cpu(out_BHND, weight_HDC, bias_C, selected_BNH, gates_BNH)


def empty_heads(rows: Tensor, weight_HDC: Tensor, selected_BNH: Tensor) -> Tensor:
    """[B, H, N, D] with the heads of a token side by side in memory."""
    return rows.new_empty(*selected_BNH.shape, weight_HDC.shape[1]).transpose(1, 2)


@torch.library.register_fake("mixhead::project_to_heads_cpu")
def to_heads_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, selected: Tensor) -> Tensor:
    """Shape and strides of the queries."""
    return empty_heads(hidden, weight, selected)


@torch.library.register_fake("mixhead::project_to_heads_cpu_backward")
def to_heads_backward_fake(
    grad: Tensor, hidden: Tensor, weight: Tensor, selected: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and strides of the gradients."""
    return hidden.new_empty(hidden.shape), torch.empty_like(weight), weight.new_empty(weight.shape[:2])


@torch.library.register_fake("mixhead::project_from_heads_cpu")
def from_heads_fake(out: Tensor, weight: Tensor, bias: Tensor | None, selected: Tensor, gates: Tensor | None) -> Tensor:
    """Shape of the rows."""
    return out.new_empty(*selected.shape[:2], weight.shape[2])


@torch.library.register_fake("mixhead::project_from_heads_cpu_backward")
def from_heads_backward_fake(
    grad: Tensor, out: Tensor, weight: Tensor, selected: Tensor, gates: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and strides of the gradients."""
    dgates = grad.new_empty(0) if gates is None else gates.new_empty(gates.shape)
    return empty_heads(out, weight, selected), torch.empty_like(weight), dgates


def save_to_heads(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the inputs."""
    hidden, weight, bias, selected = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(hidden, weight, selected)


def to_heads_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the hidden states, the weights and the biases."""
    hidden, weight, selected = ctx.saved_tensors
    dhidden, dweight, dbias = torch.ops.mixhead.project_to_heads_cpu_backward(grad, hidden, weight, selected)
    return dhidden, dweight, dbias if ctx.has_bias else None, None


def save_from_heads(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the inputs."""
    out, weight, bias, selected, gates = inputs
    ctx.has_bias, ctx.has_gates = bias is not None, gates is not None
    ctx.save_for_backward(out, weight, selected, gates)


def from_heads_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the heads' outputs, the weights, the bias and the gates (0 where a head is not selected)."""
    out, weight, selected, gates = ctx.saved_tensors
    dout, dweight, dgates = torch.ops.mixhead.project_from_heads_cpu_backward(grad, out, weight, selected, gates)
    dbias = grad.sum((0, 1)) if ctx.has_bias and ctx.needs_input_grad[2] else None
    return dout, dweight, dbias, None, dgates if ctx.has_gates else None


def no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    """Raises: the kernel has no formula for it."""
    raise NotImplementedError("The CPU kernel has no second derivative. Pass impl='gathered' or impl='dense'.")


for name, backward, save in (
    ("project_to_heads_cpu", to_heads_backward, save_to_heads),
    ("project_from_heads_cpu", from_heads_backward, save_from_heads),
):
    torch.library.register_autograd(f"mixhead::{name}", backward, setup_context=save)
    torch.library.register_autograd(f"mixhead::{name}_backward", no_second_derivative)
