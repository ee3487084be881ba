"""One new token of a linear router, its attention and the constants of the heads that it skips, in one operator.

In decoding the weights of a whole layer pass through the processor's caches between two attentions, so that every
operator begins cold: four of them take longer than the attention of all heads to a short cache.

Shape legend: B batch, T keys, H query heads, K key-value heads, D head dim, C hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixhead.ops.attention.choose import kernel_pays
from mixhead.routing.one_operator import can_route

NAME = "mixhead::decode_routed_cpu"
torch.library.define(
    NAME,
    "(Tensor hidden, Tensor weight, Tensor bias, Tensor shared, Tensor? skipped, Tensor q, Tensor k, Tensor v,"
    " int active_heads, int num_groups, float scale) -> Tensor",
)
DECODE = torch.ops.mixhead.decode_routed_cpu.default
MOST_GROUPS = 16  # query heads for each key-value head; with more, blocks of rows are faster


@torch.library.register_fake(NAME)
def decode_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor, shared: Tensor, skipped: Tensor | None, q: Tensor, *_: object
) -> Tensor:
    """Shape of the output."""
    return q.new_empty(q.shape[0], 1, q.shape[1], q.shape[3])


def can_decode(
    proj: nn.Linear, hidden_B1C: Tensor, q_BH1D: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, skipped_HD: Tensor | None
) -> bool:
    """Whether `auto` would take the C++ kernel for this token, and the operator can take all of it."""
    q_shape, dtype = q_BH1D.shape, q_BH1D.dtype
    return (
        q_shape[2] == 1
        and can_route(proj, hidden_B1C)
        and kernel_pays(q_BH1D, k_BKTD, v_BKTD, causal=True, gradient=False)
        and hidden_B1C.dtype == dtype
        and k_BKTD.dtype == dtype
        and v_BKTD.dtype == dtype
        and q_shape[3] == v_BKTD.shape[3]
        and q_shape[1] <= MOST_GROUPS * k_BKTD.shape[1]
        and q_BH1D.stride(3) == 1
        and k_BKTD.stride(3) == 1
        and v_BKTD.stride(3) == 1
        and (skipped_HD is None or (skipped_HD.dtype == dtype and skipped_HD.is_contiguous()))
    )
