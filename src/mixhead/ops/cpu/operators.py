"""The kernel as operators of PyTorch: schemas, fake tensors and autograd. The compiled library adds the computation.

Shape legend: B batch, N queries, T keys, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixhead.ops.engine import Mask
from mixhead.routing import Routing

torch.library.define(
    "mixhead::attend_cpu",
    "(Tensor q, Tensor k, Tensor v, Tensor gates, Tensor selected, Tensor? mask, bool causal, float scale)"
    " -> (Tensor output, Tensor statistics)",
)
torch.library.define(
    "mixhead::attend_cpu_inference",
    "(Tensor q, Tensor k, Tensor v, Tensor gates, Tensor selected, Tensor? mask, bool causal, float scale) -> Tensor",
)
torch.library.define(
    "mixhead::attend_cpu_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor gates, Tensor selected, Tensor? mask, Tensor output,"
    " Tensor statistics, bool causal, float scale) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dgates)",
)

# Looked up once: in every call it would take a few percent of the attention of one token.
ATTEND = torch.ops.mixhead.attend_cpu.default
ATTEND_WITHOUT_GRADIENT = torch.ops.mixhead.attend_cpu_inference.default


def attend(
    q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing, *, causal: bool, scale: float, attn_mask: Mask
) -> Tensor:
    """Each selected head's attention times its gate. The kernel must be built, and `refusal` must be None."""
    gates_BNH = routing.gates_BNH
    arguments = (q_BHND, k_BKTD, v_BKTD, gates_BNH, routing.selected_BNH, attn_mask, causal, scale)
    # What an autograd formula in Python adds to a call is as long as the attention of one token to a short cache.
    if not (torch.is_grad_enabled() and any_requires_grad(q_BHND, k_BKTD, v_BKTD, gates_BNH)):
        only_BHND: Tensor = ATTEND_WITHOUT_GRADIENT(*arguments)
        return only_BHND
    out_BHND, _ = ATTEND(*arguments)
    return out_BHND


def any_requires_grad(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> bool:
    """One by one: a loop takes longer than all the rest of a call's checks."""
    return q.requires_grad or k.requires_grad or v.requires_grad or gates.requires_grad


def empty_by_token(x_BHND: Tensor) -> Tensor:
    """[B, H, N, D] with the heads of a token side by side in memory, as the output projection wants them."""
    batch, heads, tokens, head_dim = x_BHND.shape
    return x_BHND.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


@torch.library.register_fake("mixhead::attend_cpu")
def attend_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Shapes and strides of the output and the statistics."""
    batch, heads, tokens, _head_dim = q.shape
    return empty_by_token(q), q.new_empty(2, batch, heads, tokens, dtype=torch.float32)


@torch.library.register_fake("mixhead::attend_cpu_inference")
def inference_fake(q: Tensor, *_: Any) -> Tensor:
    """Shape and strides of the output."""
    return empty_by_token(q)


@torch.library.register_fake("mixhead::attend_cpu_backward")
def backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *_: Any) -> tuple[Tensor, ...]:
    """Shapes and strides of the gradients."""
    return empty_by_token(q), empty_by_token(k), empty_by_token(v), gates.new_empty(gates.shape)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps the inputs, the output and two numbers per query and head: no N x T tensor."""
    q, k, v, gates, selected, mask, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, gates, selected, mask, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and the gates. A gate has one where its head is selected."""
    if grad is None:
        return (None,) * 8
    q, k, v, gates, selected, mask, output, statistics = ctx.saved_tensors
    gradients = torch.ops.mixhead.attend_cpu_backward(
        grad, q, k, v, gates, selected, mask, output, statistics, ctx.causal, ctx.scale
    )
    return *gradients, None, None, None, None


def no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    """Raises: the kernel has no formula for it."""
    raise NotImplementedError("The CPU kernel has no second derivative. Pass impl='reference'.")


torch.library.register_autograd("mixhead::attend_cpu", backward, setup_context=save_for_backward)
torch.library.register_autograd("mixhead::attend_cpu_backward", no_second_derivative)
