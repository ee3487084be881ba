"""The Triton kernels of `mixhead.ops.triton`, for GPUs."""

from __future__ import annotations

from torch import Tensor

from mixhead.ops import triton
from mixhead.ops.attention.engine import Engine
from mixhead.routing import Routing


def attend(
    q_BHND: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    routing: Routing,
    *,
    causal: bool,
    scale: float,
    attn_mask: Tensor | None,
) -> Tensor:
    """Each selected head's attention times its gate."""
    return triton.attend(
        q_BHND,
        k_BKTD,
        v_BKTD,
        routing.gates_BNH,
        routing.selected_BNH,
        causal=causal,
        scale=scale,
        attn_mask=attn_mask,
    )


def refusal(q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing, attn_mask: Tensor | None) -> str | None:
    """Why the kernels cannot take these arguments, in a sentence; None where they can."""
    return triton.refusal(q_BHND, attn_mask)


ENGINE = Engine("triton", attend, refusal)
