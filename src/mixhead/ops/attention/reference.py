"""The masked mathematics, one line a step: slow, on any device, in any dtype, with any gradient.

It defines what every other implementation has to compute. It holds an N x T tensor for every head.

Shape legend of this room: B batch, N queries, T keys, H query heads, K key-value heads (K divides H), D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixhead.ops.engine import Engine, Mask
from mixhead.ops.masks import attended_BHNT
from mixhead.routing import Routing


def attend(
    q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing, *, causal: bool, scale: float, attn_mask: Mask
) -> Tensor:
    """Each selected head's attention times its gate, [B, H, N, D]; zero where a head is not selected."""
    gates_BNH, selected_BNH = routing.gates_BNH, routing.selected_BNH
    selected_BHN1 = selected_BNH.transpose(1, 2).unsqueeze(-1)
    # What nobody reads is cleared, since the gradient of a NaN that is masked later is NaN all the same.
    q_BHND = q_BHND.masked_fill(~selected_BHN1, 0.0)
    gates_BNH = gates_BNH.masked_fill(~selected_BNH, 0.0)
    groups = q_BHND.shape[1] // k_BKTD.shape[1]
    k_BHTD = k_BKTD.repeat_interleave(groups, dim=1)
    v_BHTD = v_BKTD.repeat_interleave(groups, dim=1)
    scores_BHNT = (q_BHND @ k_BHTD.mT) * scale
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores_BHNT = scores_BHNT + attn_mask
    allowed_BHNT = attended_BHNT(q_BHND, k_BKTD, attn_mask, causal)
    if allowed_BHNT is not None:
        scores_BHNT = scores_BHNT.masked_fill(~allowed_BHNT, -torch.inf)
    # A query that may attend to nothing has no weights; its output is 0, as in scaled_dot_product_attention. Its scores
    # are replaced too, since the gradient of a softmax of nothing but -inf is NaN.
    blind_BHN1 = (scores_BHNT == -torch.inf).all(-1, keepdim=True)
    weights_BHNT = scores_BHNT.masked_fill(blind_BHN1, 0.0).softmax(-1).masked_fill(blind_BHN1, 0.0)
    out_BHND = weights_BHNT @ v_BHTD
    gates_BHN1 = gates_BNH.transpose(1, 2).unsqueeze(-1)
    return torch.where(selected_BHN1, out_BHND * gates_BHN1, 0.0)


ENGINE = Engine("reference", attend)
