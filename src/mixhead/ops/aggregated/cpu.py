"""The C++ kernel of aggregated attention as operators of PyTorch; how it works is told in `source/aggregated.h`.

No window is unfolded and only selected heads are computed, forward and backward; beside the inputs, two numbers per
query and head are kept for the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixhead.ops.aggregated.arguments import AggregatedArguments
from mixhead.ops.cpu.level import best_level
from mixhead.ops.cpu.usable import unusable

DTYPES = (torch.float32, torch.bfloat16)
# Widest head that the kernel takes, by instruction set, as in the source.
MAX_HEAD_DIM = {"amx": 64, "avx512_bf16": 64, "avx512": 64, "avx2": 32, "neon": 32, "plain": 32}
MAX_WINDOW = 7

INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor pool_k, Tensor pool_v, Tensor? gates, Tensor? selected, int rows,"
    " Tensor embedding, Tensor temperature, Tensor local_bias, Tensor pool_bias, Tensor tokens, Tensor learnable_bias,"
    " Tensor row_index, Tensor column_index"
)
ROWS, GATES, NUM_INPUTS = 7, 5, 16

torch.library.define("mixhead::aggregate_cpu", f"({INPUTS}) -> (Tensor output, Tensor statistics)")
torch.library.define("mixhead::aggregate_cpu_backward", f"(Tensor grad, {INPUTS}, Tensor statistics) -> Tensor[]")


def attend(a: AggregatedArguments) -> Tensor:
    """Aggregated attention of the selected heads times their gates. `refusal` must be None."""
    # All in float32, also where the model is in bfloat16: the queries' norms and the softmax need it.
    gates_BNH, selected_BNH = as_float(a.gates_BNH), a.selected_BNH
    out_BHND, _ = torch.ops.mixhead.aggregate_cpu(
        *(t.float() for t in (a.q_BHND, a.k_BHND, a.v_BHND, a.k_BHTD, a.v_BHTD)),
        gates_BNH,
        selected_BNH,
        a.size[0],
        *(t.float() for t in (a.query_embedding_HD, a.temperature_H, a.local_bias_HL, a.pool_bias.table_HRS)),
        *(t.float() for t in (a.learnable_tokens_HDL, a.learnable_bias_HL)),
        a.pool_bias.row_YU,
        a.pool_bias.column_XV,
    )
    return out_BHND.to(a.v_BHND.dtype)


def as_float(tensor: Tensor | None) -> Tensor | None:
    """The tensor in float32, if there is one."""
    return None if tensor is None else tensor.float()


def refusal(q_BHND: Tensor, k_BHTD: Tensor, window: int) -> str | None:
    """Why the kernel cannot take these arguments, in a sentence; None where it can. May build the kernel."""
    if q_BHND.device.type != "cpu":
        return f"the kernel runs on the CPU, and the queries are on {q_BHND.device.type}"
    if q_BHND.dtype not in DTYPES:
        return f"the kernel computes in float32, not in {q_BHND.dtype}"
    if 0 in q_BHND.shape or 0 in k_BHTD.shape:
        return "there is nothing to compute"
    if q_BHND.shape[-1] > MAX_HEAD_DIM[best_level()] or window > MAX_WINDOW:
        return "the heads or the window are wider than the kernel takes"
    return unusable("aggregated")


def empty_by_token(x_BHND: Tensor) -> Tensor:
    """[B, H, N, D] with the heads of a token side by side in memory, as the output projection wants them."""
    batch, heads, tokens, head_dim = x_BHND.shape
    return x_BHND.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


@torch.library.register_fake("mixhead::aggregate_cpu")
def aggregate_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Shapes and strides of the output and the statistics."""
    return empty_by_token(q), q.new_empty(2, *q.shape[:3])


@torch.library.register_fake("mixhead::aggregate_cpu_backward")
def backward_fake(grad: Tensor, *inputs: Any) -> list[Tensor]:
    """Shapes and strides of the gradients."""
    gates = inputs[GATES]
    d_gates = grad.new_empty(0) if gates is None else gates.new_empty(gates.shape)
    parameters = [t.new_empty(t.shape) for t in inputs[ROWS + 1 : NUM_INPUTS - 2]]
    return [*(empty_by_token(t) for t in inputs[:GATES]), d_gates, *parameters]


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps the inputs and two numbers per query and head."""
    ctx.rows = inputs[ROWS]
    ctx.save_for_backward(*inputs[:ROWS], *inputs[ROWS + 1 :], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs. A gate has one where its head is selected."""
    if grad is None:
        return (None,) * NUM_INPUTS
    *inputs, statistics = ctx.saved_tensors
    inputs.insert(ROWS, ctx.rows)
    gradients: list[Tensor | None] = list(torch.ops.mixhead.aggregate_cpu_backward(grad, *inputs, statistics))
    if inputs[GATES] is None:
        gradients[GATES] = None
    return *gradients[: GATES + 1], None, None, *gradients[GATES + 1 :], None, None


def no_second_derivative(ctx: Any, *_: Any) -> None:
    """Raises: the kernel has no formula for it."""
    raise NotImplementedError("The CPU kernel has no second derivative. Pass impl='portable'.")


torch.library.register_autograd("mixhead::aggregate_cpu", backward, setup_context=save_for_backward)
torch.library.register_autograd("mixhead::aggregate_cpu_backward", no_second_derivative)
