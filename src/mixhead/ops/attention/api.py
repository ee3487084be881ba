"""`head_attention`: checks its arguments, picks an engine, and runs it.

The name is the mathematics, `impl` is the engine. An engine is one file with an `ENGINE`; a faster one comes in by that
file and a line in `engines`. Which one `auto` takes is decided in `choose`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.ops.attention.choose import explain, kernel_at_once
from mixhead.ops.attention.engines import IMPLEMENTATIONS
from mixhead.ops.autocast import autocast_together
from mixhead.ops.engine import Engine, asked_for
from mixhead.routing import Routing


def head_attention(
    q_BHND: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    routing: Routing,
    *,
    causal: bool = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of exactly the heads that each token selected, times their gates (MoH, arXiv 2410.11842, eq. 4).

    Args:
        q_BHND: queries of all heads; rows of heads that are not selected are never read into the result.
        k_BKTD: keys; K divides H, and each run of H / K query heads shares one key-value head.
        v_BKTD: values, of the same shape as the keys.
        routing: gates and selected heads, [B, N, H]. The gradient of a gate is defined at selected heads only.
        causal: a query sees the keys up to its own position; the last query sees the last key (N may differ from T).
        scale: factor of the scores; 1 / sqrt(D) by default.
        attn_mask: bool (True = may attend) or floating (added to the scores), broadcastable to [B, H, N, T].
        impl: "auto" or one of `IMPLEMENTATIONS`.

    Returns:
        [B, H, N, D] in the dtype of `q_BHND` (under autocast in its dtype, as from scaled_dot_product_attention): zero
        where a head is not selected or may attend to nothing.

    Raises:
        MixheadError: where shapes, dtypes, devices or the name of the implementation do not fit, or where the
            implementation that was asked for cannot take these arguments here (see `Engine.refusal`): none becomes
            another one in silence.
    """
    if not isinstance(routing, Routing):
        raise MixheadError(f"routing must be a mixhead.Routing, got {type(routing).__name__}; see Routing.from_gates.")
    if impl == "auto" and attn_mask is None and kernel_at_once(q_BHND, k_BKTD, v_BKTD, routing, causal):
        try:
            return run(IMPLEMENTATIONS["cpu"], q_BHND, k_BKTD, v_BKTD, routing, causal, scale, None)
        except RuntimeError:
            check_arguments(q_BHND, k_BKTD, v_BKTD, routing, None)  # The kernel refuses what does not fit: say what.
            raise
    q_BHND, k_BKTD, v_BKTD = autocast_together(q_BHND, k_BKTD, v_BKTD)
    check_arguments(q_BHND, k_BKTD, v_BKTD, routing, attn_mask)
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        attn_mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(q_BHND.dtype)
    if impl == "auto":
        engine = IMPLEMENTATIONS[explain(q_BHND, k_BKTD, routing, causal=causal, attn_mask=attn_mask).impl]
    else:
        engine = asked_for(impl, IMPLEMENTATIONS, q_BHND, k_BKTD, v_BKTD, routing, attn_mask)
        if q_BHND.numel() == 0 or k_BKTD.numel() == 0:
            engine = IMPLEMENTATIONS["reference"]  # There is nothing to compute, in any way.
    return run(engine, q_BHND, k_BKTD, v_BKTD, routing, causal, scale, attn_mask)


def run(
    engine: Engine[Any],
    q_BHND: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    routing: Routing,
    causal: bool,
    scale: float | None,
    attn_mask: Tensor | None,
) -> Tensor:
    """That engine, with what a user may leave out, and gates in the dtype of the queries."""
    if routing.gates_BNH.dtype != q_BHND.dtype:
        routing = replace(routing, gates_BNH=routing.gates_BNH.to(q_BHND.dtype))
    scale = (q_BHND.shape[-1] or 1) ** -0.5 if scale is None else scale
    return engine.run(q_BHND, k_BKTD, v_BKTD, routing, causal=causal, scale=scale, attn_mask=attn_mask)


def check_arguments(q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing, attn_mask: Tensor | None) -> None:
    """Raises a `MixheadError` that names the argument, the expected shape and the one received."""
    # Shapes are asked for once: each costs as much as the rest of a check.
    q_shape, k_shape, v_shape = q_BHND.shape, k_BKTD.shape, v_BKTD.shape
    for name, tensor, shape in (("q_BHND", q_BHND, q_shape), ("k_BKTD", k_BKTD, k_shape), ("v_BKTD", v_BKTD, v_shape)):
        if len(shape) != 4:
            raise MixheadError(f"{name} must have 4 dimensions [batch, heads, tokens, head_dim], got {list(shape)}.")
        if tensor.dtype != q_BHND.dtype:
            raise MixheadError(f"{name} is {tensor.dtype}, but q_BHND is {q_BHND.dtype}: they must have one dtype.")
    if not q_BHND.is_floating_point():
        raise MixheadError(f"q_BHND, k_BKTD and v_BKTD must be floating point, got {q_BHND.dtype}.")
    check_devices(q_BHND, k_BKTD, v_BKTD, routing, attn_mask)
    batch, heads, queries, head_dim = q_shape
    _, kv_heads, keys, _ = k_shape
    if k_shape != (batch, kv_heads, keys, head_dim) or kv_heads == 0 or heads % kv_heads:
        raise MixheadError(
            f"k_BKTD must be [{batch}, K, T, {head_dim}] with K dividing the {heads} query heads, got {list(k_shape)}."
        )
    if v_shape != k_shape:
        raise MixheadError(f"v_BKTD must have the shape of k_BKTD, {list(k_shape)}, got {list(v_shape)}.")
    gates_BNH, selected_BNH, of_routing = routing.gates_BNH, routing.selected_BNH, (batch, queries, heads)
    if gates_BNH.shape != of_routing:
        raise MixheadError(f"routing.gates_BNH must be {list(of_routing)}, got {list(gates_BNH.shape)}.")
    if selected_BNH.shape != of_routing:
        raise MixheadError(f"routing.selected_BNH must be {list(of_routing)}, got {list(selected_BNH.shape)}.")
    if selected_BNH.dtype != torch.bool:
        raise MixheadError(f"routing.selected_BNH must be torch.bool, got {selected_BNH.dtype}.")
    if attn_mask is None:
        return
    if not broadcasts_to(attn_mask.shape, (batch, heads, queries, keys)):
        raise MixheadError(
            f"attn_mask must broadcast to [{batch}, {heads}, {queries}, {keys}], got {list(attn_mask.shape)}."
        )
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise MixheadError(
            "attn_mask must be torch.bool (True = may attend) or floating point (added to the scores), "
            f"got {attn_mask.dtype}."
        )


def check_devices(q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing, attn_mask: Tensor | None) -> None:
    """Raises where the arguments are not all on one device: a kernel would read what is not there."""
    device, others = q_BHND.device, {"k_BKTD": k_BKTD, "v_BKTD": v_BKTD, "attn_mask": attn_mask}
    others |= {"routing.gates_BNH": routing.gates_BNH, "routing.selected_BNH": routing.selected_BNH}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise MixheadError(f"{name} is on {tensor.device}, but q_BHND is on {device}: they must be on one device.")


def broadcasts_to(shape: torch.Size, target: tuple[int, ...]) -> bool:
    """Whether a tensor of `shape` can be expanded to `target`."""
    padded = (1,) * (len(target) - len(shape)) + tuple(shape)
    return len(padded) == len(target) and all(a in (1, b) for a, b in zip(padded, target, strict=True))
