"""One new token of a converted layer, in one operator: in decoding the way there takes longer than the attention."""

from __future__ import annotations

from torch import Tensor, nn

from mixhead.ops.decoding import DECODE, can_decode
from mixhead.routing import LinearRouter


def decode_token(
    router: nn.Module,
    skipped_HD: Tensor | None,
    hidden_B1C: Tensor,
    q_BH1D: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    scale: float | None,
) -> Tensor | None:
    """Attention of the heads that the router selects, with the constants of the others, [B, 1, H, D].

    Without a mask, a gradient, or anybody who wants to know the routing. None where it takes more than one operator.
    """
    if type(router) is not LinearRouter or is_heard(router):
        return None
    proj = router.score_proj
    if not can_decode(proj, hidden_B1C, q_BH1D, k_BKTD, v_BKTD, skipped_HD):
        return None
    scale = q_BH1D.shape[3] ** -0.5 if scale is None else scale
    return DECODE(
        hidden_B1C,
        proj.weight,
        proj.bias,
        router.shared_H,
        skipped_HD,
        q_BH1D,
        k_BKTD,
        v_BKTD,
        router.active_heads,
        router.num_groups,
        scale,
    )


def is_heard(router: nn.Module) -> bool:
    """Whether somebody waits for the router to be called, as `mixhead.record_routing` does."""
    return bool(router._forward_hooks or router._forward_pre_hooks or "forward" in vars(router))
