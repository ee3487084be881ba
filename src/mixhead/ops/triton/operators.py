"""The kernels as operators of PyTorch: schemas, fake tensors, autograd, and how they are launched.

Nothing here imports Triton before an operator runs. The lists of rows are made on the device and the grid has room for
every token at every head, so that the host never waits for a count.

Shape legend: B batch, N queries, T keys, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixhead.ops.engine import Mask
from mixhead.ops.rows import selected_first
from mixhead.routing import Routing

torch.library.define(
    "mixhead::attend_triton",
    "(Tensor q, Tensor k, Tensor v, Tensor gates, Tensor selected, Tensor? mask, bool causal, float scale, bool keep)"
    " -> (Tensor output, Tensor plain, Tensor log_sums)",
)
torch.library.define(
    "mixhead::attend_triton_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor gates, Tensor selected, Tensor? mask, Tensor plain,"
    " Tensor log_sums, bool causal, float scale) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dgates)",
)


def attend(
    q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing, *, causal: bool, scale: float, attn_mask: Mask
) -> Tensor:
    """Each selected head's attention times its gate. `refusal` must be None."""
    differentiable = (q_BHND, k_BKTD, v_BKTD, routing.gates_BNH)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
    selected_BNH, settings = routing.selected_BNH, (attn_mask, causal, scale, keep)
    out_BHND, _, _ = torch.ops.mixhead.attend_triton(*differentiable, selected_BNH, *settings)
    return out_BHND


class Launch(NamedTuple):
    """What all kernels take: masks, lists of rows, sizes and block sizes."""

    mask: list[Any]
    lists: list[Tensor]
    sizes: list[Any]
    options: dict[str, Any]


def launch(
    q: Tensor, k: Tensor, gates: Tensor, selected: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Launch:
    """The arguments that the three kernels share."""
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    kind, bias = 0, q.new_empty(1).expand(batch, heads, queries, keys)
    if mask is not None:
        kind, bias = (1, mask.view(torch.uint8)) if mask.dtype == torch.bool else (2, mask)
        bias = bias.expand(batch, heads, queries, keys)
    selected_BHN = selected.transpose(1, 2)
    lists = [gates.transpose(1, 2).contiguous(), selected_first(selected_BHN), selected_BHN.cumsum(-1).contiguous()]
    options = {
        "CAUSAL": causal,
        "MASK": kind,
        "INTERPRETED": kernels().INTERPRETED,
        **blocks(head_dim, q.element_size()),
    }
    sizes = [heads, heads // k.shape[1], queries, keys, head_dim, scale]
    return Launch([bias, *bias.stride()], lists, sizes, options)


def blocks(head_dim: int, element_size: int) -> dict[str, int]:
    """Rows and keys of a block, the padded head dim, and warps: so that the compiler keeps a block in the registers.

    float32 is multiplied exactly, outside the matrix units, and needs smaller blocks.
    """
    width = max(16, 1 << (head_dim - 1).bit_length())
    if element_size == 4:
        side, warps = (32, 8) if width <= 64 else (16, 8)
    else:
        side, warps = (64, 4) if width <= 128 else (32, 4)
    return {"ROWS": side, "KEYS": side, "WIDTH": width, "num_warps": warps, "num_stages": 2}


def kernels() -> ModuleType:
    """The kernels; the first call imports Triton."""
    from mixhead.ops.triton import kernels

    return kernels


def strided(*tensors: Tensor) -> list[Any]:
    """Each tensor before its strides."""
    return [argument for t in tensors for argument in (t, *t.stride())]


def zeros_by_token(x_BHND: Tensor) -> Tensor:
    """[B, H, N, D] with the heads of a token side by side in memory, as the output projection wants them."""
    batch, heads, tokens, head_dim = x_BHND.shape
    return x_BHND.new_zeros(batch, tokens, heads, head_dim).transpose(1, 2)


@torch.library.impl("mixhead::attend_triton", ("cpu", "cuda"))
def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    selected: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output and, where a gradient will be asked for, it without gates and the logarithms of the softmax's sums."""
    args = launch(q, k, gates, selected, mask, causal, scale)
    batch, heads, queries, _ = q.shape
    out, plain, log_sums = zeros_by_token(q), *kept(q, keep)
    grid = (-(-queries // args.options["ROWS"]) * batch * heads,)
    with torch.cuda.device_of(q):
        kernels().forward[grid](
            *strided(q, k, v), *args.mask, *args.lists, out, plain, *out.stride()[:3], log_sums, *args.sizes,
            KEEP=keep, **args.options,
        )  # fmt: skip
    return out, plain, log_sums


def kept(q: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Room for what the gradient needs, 0 where a head is not selected; none where no gradient is asked for."""
    if not keep:
        return q.new_empty(0), q.new_empty(0, dtype=torch.float32)
    return zeros_by_token(q), q.new_zeros(q.shape[:3], dtype=torch.float32)


@torch.library.impl("mixhead::attend_triton_backward", ("cpu", "cuda"))
def run_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    selected: Tensor,
    mask: Tensor | None,
    plain: Tensor,
    log_sums: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the gates; those of a head's query and gate are 0 where it is not selected."""
    args = launch(q, k, gates, selected, mask, causal, scale)
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    dq, dk, dv = zeros_by_token(q), zeros_by_token(k), zeros_by_token(v)
    dgates = q.new_zeros(batch, heads, queries, dtype=torch.float32)
    query_grid = (-(-queries // args.options["ROWS"]) * batch * heads,)
    key_grid = (-(-keys // args.options["KEYS"]) * batch * kv_heads,)
    shared = [*strided(grad, q, k, v), *args.mask, *args.lists]
    with torch.cuda.device_of(q):
        kernels().query_gradient[query_grid](
            *shared, plain, log_sums, dq, dgates, *dq.stride()[:3], *args.sizes, **args.options
        )
        kernels().key_gradient[key_grid](
            *shared, log_sums, dgates, dk, dv, *dk.stride()[:3], *args.sizes, **args.options
        )
    return dq, dk, dv, dgates.transpose(1, 2).to(gates.dtype).contiguous()


@torch.library.register_fake("mixhead::attend_triton")
def fake_forward(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and strides of the output and of what is kept."""
    return zeros_by_token(q), *kept(q, keep=rest[-1])


@torch.library.register_fake("mixhead::attend_triton_backward")
def fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *_: Any) -> tuple[Tensor, ...]:
    """Shapes and strides of the gradients."""
    return zeros_by_token(q), zeros_by_token(k), zeros_by_token(v), gates.new_empty(gates.shape)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keeps the inputs, the output without gates and one number per query and head: no N x T tensor."""
    q, k, v, gates, selected, mask, ctx.causal, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, gates, selected, mask, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and the gates. A gate has one where its head is selected."""
    if grad is None:
        return (None,) * 9
    q, k, v, gates, selected, mask, plain, log_sums = ctx.saved_tensors
    gradients = torch.ops.mixhead.attend_triton_backward(
        grad, q, k, v, gates, selected, mask, plain, log_sums, ctx.causal, ctx.scale
    )
    return *gradients, None, None, None, None, None


def no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    """Raises: the kernels have no formula for it."""
    raise NotImplementedError("The Triton kernels have no second derivative. Pass impl='reference'.")


torch.library.register_autograd("mixhead::attend_triton", backward, setup_context=save_for_backward)
torch.library.register_autograd("mixhead::attend_triton_backward", no_second_derivative)
