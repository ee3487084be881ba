"""The C++ kernel of `mixhead.ops.cpu`: queries that select a head are gathered, so the others cost nothing."""

from __future__ import annotations

from torch import Tensor

from mixhead.ops import cpu
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
    """Each selected head's attention times its gate. The kernel must be built, and `refusal` must be None."""
    return cpu.attend(
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
    """Why the kernel cannot take these arguments, in a sentence; None where it can. May build the kernel."""
    return cpu.refusal(q_BHND, attn_mask)


ENGINE = Engine("cpu", attend, refusal)
