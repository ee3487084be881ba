"""The projections of selected heads as operators of PyTorch: schemas, fake tensors and autograd.

The compiled library adds the computation, `source/projections.h` tells how it works. Which heads a token uses is a
`choice`: bool [B, N, H], or int64 [B, N, S], the head (expert) in each of its slots and H where one is empty. The rows
of heads stand in a tensor [B, S, N, D], with a slot for every head (S = H) in the first case.

Shape legend: B batch, N tokens, H heads, S slots, D head dim, C hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixhead.ops.cpu.level import best_level
from mixhead.ops.cpu.usable import unusable

torch.library.define(
    "mixhead::project_to_heads_cpu", "(Tensor hidden, Tensor weight, Tensor? bias, Tensor choice) -> Tensor"
)
torch.library.define(
    "mixhead::project_to_heads_cpu_backward",
    "(Tensor grad, Tensor hidden, Tensor weight, Tensor choice, bool has_bias)"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
)
torch.library.define(
    "mixhead::project_from_heads_cpu",
    "(Tensor out, Tensor weight, Tensor? bias, Tensor choice, Tensor? gates) -> Tensor",
)
torch.library.define(
    "mixhead::project_from_heads_cpu_backward",
    "(Tensor grad, Tensor out, Tensor weight, Tensor choice, Tensor? gates)"
    " -> (Tensor dout, Tensor dweight, Tensor dgates)",
)


UNITS_OF_BFLOAT16 = ("amx", "avx512_bf16")  # levels that multiply bfloat16


def refusal(rows: Tensor) -> str | None:
    """Why the kernel cannot take these rows, in a sentence; None where it can. May build the kernel."""
    if rows.device.type != "cpu":
        return f"the kernel runs on the CPU, and the rows are on {rows.device.type}"
    if rows.dtype not in (torch.float32, torch.bfloat16):
        return f"the kernel computes in float32 and bfloat16, not in {rows.dtype}"
    return unusable("projections")


def to_heads(hidden_BNC: Tensor, weight_HDC: Tensor, bias_HD: Tensor | None, choice: Tensor) -> Tensor:
    """The queries of the chosen heads, [B, S, N, D]. The kernel must be built, and `refusal` must be None."""
    hidden_BNC, weight_HDC, bias_HD, dtype = multiplied(hidden_BNC, weight_HDC, bias_HD)
    return torch.ops.mixhead.project_to_heads_cpu(hidden_BNC, weight_HDC, bias_HD, choice).to(dtype)


def from_heads(
    out_BSND: Tensor, weight_HDC: Tensor, bias_C: Tensor | None, choice: Tensor, gates_BNS: Tensor | None
) -> Tensor:
    """The sum over the chosen heads, [B, N, C]. The kernel must be built, and `refusal` must be None."""
    gates_BNS = None if gates_BNS is None else gates_BNS.float()
    out_BSND, weight_HDC, bias_C, dtype = multiplied(out_BSND, weight_HDC, bias_C)
    return torch.ops.mixhead.project_from_heads_cpu(out_BSND, weight_HDC, bias_C, choice, gates_BNS).to(dtype)


def multiplied(rows: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype]:
    """The arguments in the dtype that this processor multiplies, bfloat16 or float32, and that of the result."""
    if rows.dtype == torch.bfloat16 and best_level() not in UNITS_OF_BFLOAT16:
        return rows.float(), weight.float(), None if bias is None else bias.float(), rows.dtype
    return rows, weight, bias, rows.dtype


def to_slots(hidden_BNC: Tensor, weight_EDC: Tensor, expert_BNS: Tensor) -> Tensor:
    """What the experts in the slots make of the rows, [B, N, S, D]."""
    return to_heads(hidden_BNC, weight_EDC, None, expert_BNS).transpose(1, 2)


def from_slots(out_BNSD: Tensor, weight_EDC: Tensor, expert_BNS: Tensor, gates_BNS: Tensor | None) -> Tensor:
    """The sum over the slots, [B, N, C]."""
    return from_heads(out_BNSD.transpose(1, 2), weight_EDC, None, expert_BNS, gates_BNS)


def empty_heads(rows: Tensor, weight_HDC: Tensor, choice: Tensor) -> Tensor:
    """[B, S, N, D] with the slots of a token side by side in memory."""
    return rows.new_empty(*choice.shape, weight_HDC.shape[1]).transpose(1, 2)


@torch.library.register_fake("mixhead::project_to_heads_cpu")
def to_heads_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, choice: Tensor) -> Tensor:
    """Shape and strides of the queries."""
    return empty_heads(hidden, weight, choice)


@torch.library.register_fake("mixhead::project_to_heads_cpu_backward")
def to_heads_backward_fake(
    grad: Tensor, hidden: Tensor, weight: Tensor, choice: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and strides of the gradients."""
    dbias = weight.new_empty(weight.shape[:2] if has_bias else 0)
    return hidden.new_empty(hidden.shape), torch.empty_like(weight), dbias


@torch.library.register_fake("mixhead::project_from_heads_cpu")
def from_heads_fake(out: Tensor, weight: Tensor, bias: Tensor | None, choice: Tensor, gates: Tensor | None) -> Tensor:
    """Shape of the rows."""
    return out.new_empty(*choice.shape[:2], weight.shape[2])


@torch.library.register_fake("mixhead::project_from_heads_cpu_backward")
def from_heads_backward_fake(
    grad: Tensor, out: Tensor, weight: Tensor, choice: Tensor, gates: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and strides of the gradients."""
    dgates = grad.new_empty(0) if gates is None else gates.new_empty(gates.shape)
    return empty_heads(out, weight, choice), torch.empty_like(weight), dgates


def save_to_heads(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the inputs."""
    hidden, weight, bias, choice = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(hidden, weight, choice)


def to_heads_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the hidden states, the weights and the biases."""
    hidden, weight, choice = ctx.saved_tensors
    arguments = (grad, hidden, weight, choice, ctx.has_bias)
    dhidden, dweight, dbias = torch.ops.mixhead.project_to_heads_cpu_backward(*arguments)
    return dhidden, dweight, dbias if ctx.has_bias else None, None


def save_from_heads(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the inputs."""
    out, weight, bias, choice, gates = inputs
    ctx.has_bias, ctx.has_gates = bias is not None, gates is not None
    ctx.save_for_backward(out, weight, choice, gates)


def from_heads_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the heads' outputs, the weights, the bias and the gates (0 where a head is not selected)."""
    out, weight, choice, gates = ctx.saved_tensors
    dout, dweight, dgates = torch.ops.mixhead.project_from_heads_cpu_backward(grad, out, weight, choice, gates)
    dbias = grad.sum((0, 1)) if ctx.has_bias and ctx.needs_input_grad[2] else None
    return dout, dweight, dbias, None, dgates if ctx.has_gates else None


def no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    """Raises: the kernel has no formula for it."""
    raise NotImplementedError("The CPU kernel has no second derivative. Pass impl='reference'.")


for name, backward, save in (
    ("project_to_heads_cpu", to_heads_backward, save_to_heads),
    ("project_from_heads_cpu", from_heads_backward, save_from_heads),
):
    torch.library.register_autograd(f"mixhead::{name}", backward, setup_context=save)
    torch.library.register_autograd(f"mixhead::{name}_backward", no_second_derivative)
