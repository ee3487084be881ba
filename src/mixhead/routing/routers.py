"""Routers: hidden states (or queries) in, a `Routing` out.

| Router | Scores | Gates | Source |
|---|---|---|---|
| `TwoStageRouter` | learned, linear | weighted, two-stage | MoH, trained from scratch (eq. 5, 6) |
| `OneStageRouter` | learned, linear | weighted | an ablation of it (table 5) |
| `QueryNormRouter` | norm of each head's query, no parameters | 0 / 1 | MoH, continue-tuned LLaMA3 (eq. 9, 10) |
| `LinearRouter` | linear, fitted by `mixhead.calibrate` | 0 / 1 | this library |

Every router has the same signature, `router(hidden_BNC, q_BHND, token_mask_BN)`, and takes from it what it needs. Those
that layers can be given by name stand in `kinds`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixhead.errors import MixheadError
from mixhead.routing.one_operator import ROUTE, can_route
from mixhead.routing.router import Router
from mixhead.routing.scores import ScoreProjection, scores_of
from mixhead.routing.selection import grouped_top_k_mask, top_k_mask
from mixhead.routing.value import Routing


class TwoStageRouter(Router):
    """Learned router with weighted gates, exactly as the official MoH code for ViT and DiT computes it.

    The first `shared_heads` heads are always used; of the other E = num_heads - shared_heads, each token uses its
    `top_k`. With p = softmax(x W_r) over the routed heads and a = 2 softmax(x W_h) (arXiv 2410.11842, eq. 5 and 6, in
    the scaling of the official code, which keeps the output scale of multi-head attention at initialisation):

    - routed gate = a_2 * top_k * p_i / (sum of the selected p); shared gate = a_1 * shared_heads * softmax(x W_s)_i
    - without shared heads a_2 is 1; with every head shared the gate is shared_heads * softmax(x W_s)_i.

    Parameters are `routed_proj.weight` [E, C] (W_r), `shared_proj.weight` [shared_heads, C] (W_s, where there are at
    least two shared heads) and `stage_proj.weight` [2, C] (W_h, where there are both kinds); none has a bias.
    """

    def __init__(self, hidden_size: int, num_heads: int, shared_heads: int, top_k: int) -> None:
        super().__init__()
        num_routed_heads = num_heads - shared_heads
        if not 0 <= shared_heads <= num_heads or not 0 <= top_k <= num_routed_heads:
            raise MixheadError(
                f"shared_heads={shared_heads} and top_k={top_k} do not fit into num_heads={num_heads}: "
                "shared_heads + top_k must be at most num_heads, and neither may be negative."
            )
        if top_k == 0 and shared_heads < num_heads:
            raise MixheadError(
                f"top_k=0 leaves {num_routed_heads} of {num_heads} heads unused for ever: "
                "choose top_k >= 1 or make every head shared."
            )
        self.num_heads, self.shared_heads, self.top_k = num_heads, shared_heads, top_k
        self.num_routed_heads = num_routed_heads
        self.routed_proj = ScoreProjection(hidden_size, num_routed_heads, bias=False) if top_k > 0 else None
        self.shared_proj = ScoreProjection(hidden_size, shared_heads, bias=False) if shared_heads > 1 else None
        self.stage_proj = ScoreProjection(hidden_size, 2, bias=False) if top_k > 0 and shared_heads > 0 else None

    @property
    def active_heads(self) -> int:
        """How many heads every token uses."""
        return self.shared_heads + self.top_k

    def reset_parameters(self) -> None:
        """Zero weights: every selected head then has the gate 1, so that routing starts as plain head selection."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden_BNC: Tensor, q_BHND: Tensor | None = None, token_mask_BN: Tensor | None = None) -> Routing:
        del q_BHND
        shared_BNS = self._shared_gates(hidden_BNC)
        if self.routed_proj is None:
            return Routing(shared_BNS, torch.ones_like(shared_BNS, dtype=torch.bool), token_mask_BN=token_mask_BN)
        probs_BNE = scores_of(self.routed_proj, hidden_BNC).softmax(-1)
        selected_BNE = top_k_mask(probs_BNE, self.top_k)
        kept_BNE = probs_BNE * selected_BNE
        routed_BNE = self.top_k * kept_BNE / kept_BNE.sum(-1, keepdim=True).clamp(min=torch.finfo(kept_BNE.dtype).eps)
        if self.stage_proj is not None:
            stage_BN2 = 2 * scores_of(self.stage_proj, hidden_BNC).softmax(-1)
            shared_BNS = shared_BNS * stage_BN2[..., :1]
            routed_BNE = routed_BNE * stage_BN2[..., 1:]
        return Routing(
            gates_BNH=torch.cat([shared_BNS, routed_BNE], -1),
            selected_BNH=torch.cat([torch.ones_like(shared_BNS, dtype=torch.bool), selected_BNE], -1),
            probs_BNH=torch.cat([torch.zeros_like(shared_BNS), probs_BNE], -1),
            num_routed_heads=self.num_routed_heads,
            token_mask_BN=token_mask_BN,
            heads_per_group=self.active_heads,
        )

    def _shared_gates(self, hidden_BNC: Tensor) -> Tensor:
        if self.shared_proj is not None:
            return self.shared_heads * scores_of(self.shared_proj, hidden_BNC).softmax(-1)
        dtype = torch.promote_types(hidden_BNC.dtype, torch.float32)
        return hidden_BNC.new_ones(*hidden_BNC.shape[:2], self.shared_heads, dtype=dtype)


class OneStageRouter(TwoStageRouter):
    """A two-stage router without its second stage, to see what that is worth (arXiv 2410.11842, table 5).

    Nothing weighs shared against routed heads: both factors a of eq. 6, in the scaling of the official code, are 1. The
    paper does not print the gates of its own ablation; these are the ones of `TwoStageRouter` where W_h is 0.
    """

    def __init__(self, hidden_size: int, num_heads: int, shared_heads: int, top_k: int) -> None:
        super().__init__(hidden_size, num_heads, shared_heads, top_k)
        self.stage_proj = None


class BinaryRouter(Router):
    """What routers with 0 / 1 gates have in common: which heads are shared, how many are active, how to select.

    Any heads may be shared, not only the first, so they are a mask: the buffer `shared_H`, which checkpoints keep.

    Args:
        num_heads: H.
        shared_heads: how many heads every token uses; the first ones until calibration sets `shared_H`.
        active_heads: how many heads each token uses, the shared ones included.
        num_groups: 1, or the number of key-value heads: each run of H / num_groups heads then has equally many active.
    """

    shared_H: Tensor

    def __init__(self, num_heads: int, shared_heads: int, active_heads: int, num_groups: int = 1) -> None:
        super().__init__()
        if not 0 <= shared_heads <= active_heads <= num_heads or active_heads == 0:
            raise MixheadError(
                f"shared_heads={shared_heads}, active_heads={active_heads} and num_heads={num_heads} do not fit: "
                "shared heads count as active, so 0 <= shared_heads <= active_heads <= num_heads and active_heads >= 1."
            )
        if num_groups < 1 or num_heads % num_groups or active_heads % num_groups or shared_heads % num_groups:
            raise MixheadError(
                f"A group-balanced router needs equally many heads in each of the {num_groups} key-value groups, but "
                f"active_heads={active_heads}, shared_heads={shared_heads} and num_heads={num_heads} are not all "
                f"multiples of {num_groups}."
            )
        self.num_heads, self.shared_heads, self.active_heads = num_heads, shared_heads, active_heads
        self.num_groups = num_groups
        self.register_buffer("shared_H", torch.zeros(num_heads, dtype=torch.bool))
        self.share_first()

    def reset_parameters(self) -> None:
        """See `share_first`."""
        self.share_first()

    def share_first(self) -> None:
        """The first heads (of every group) are shared until calibration chooses better ones."""
        position_H = torch.arange(self.num_heads, device=self.shared_H.device) % (self.num_heads // self.num_groups)
        self.shared_H.copy_(position_H < self.shared_heads // self.num_groups)

    def route(self, scores_BNH: Tensor, token_mask_BN: Tensor | None) -> Routing:
        """Top-k of the scores, the shared heads before all others; gates are 0 / 1.

        The gradient of a gate goes straight through (arXiv 2410.11842, eq. 10) to a real-valued score. The paper does
        not print that score for its norm router; here it is `soft_selection` for both routers.
        """
        # Finite, so that only shared heads rank at infinity: an infinite score or NaN (topk takes it for the largest)
        # would displace them.
        ranked_BNH = scores_BNH.detach().nan_to_num(nan=torch.finfo(scores_BNH.dtype).min)
        ranked_BNH = ranked_BNH.masked_fill(self.shared_H, torch.inf)
        selected_BNH = grouped_top_k_mask(ranked_BNH, self.active_heads, self.num_groups)
        gates_BNH = selected_BNH.to(scores_BNH.dtype)
        if torch.is_grad_enabled() and self.active_heads < self.num_heads:
            soft_BNH = soft_selection(scores_BNH, ranked_BNH, self.active_heads, self.num_groups)
            learned_BNH = selected_BNH & ~self.shared_H
            gates_BNH = gates_BNH + torch.where(learned_BNH, soft_BNH - soft_BNH.detach(), 0.0)
        probs_BNH = scores_BNH.masked_fill(self.shared_H, -torch.inf).softmax(-1)
        return self.routing(gates_BNH, selected_BNH, probs_BNH, token_mask_BN)

    def routing(
        self, gates_BNH: Tensor, selected_BNH: Tensor, probs_BNH: Tensor, token_mask_BN: Tensor | None
    ) -> Routing:
        """The routing, with what this router promises of it."""
        if self.shared_heads == self.num_heads:
            return Routing(gates_BNH, selected_BNH, token_mask_BN=token_mask_BN)
        return Routing(
            gates_BNH=gates_BNH,
            selected_BNH=selected_BNH,
            probs_BNH=probs_BNH,
            num_routed_heads=self.num_heads - self.shared_heads,
            token_mask_BN=token_mask_BN,
            heads_per_group=self.active_heads // self.num_groups,
            num_groups=self.num_groups,
        )


class QueryNormRouter(BinaryRouter):
    """Parameter-free router of MoH-LLaMA3: the score of a head is the l2 norm of the token's query for it.

    As in the official inference code the norms are divided by their standard deviation over the routed heads (with a
    guard against 0, which the official code lacks); that moves no selection. They are computed in float32 at least: in
    half precision their squares overflow. Rotary embedding keeps norms, so queries may come before or after it.
    """

    needs_query = True

    def forward(self, hidden_BNC: Tensor | None, q_BHND: Tensor | None, token_mask_BN: Tensor | None = None) -> Routing:
        if q_BHND is None:
            raise MixheadError("The query-norm router needs the queries q_BHND, but it received None.")
        dtype = torch.promote_types(q_BHND.dtype, torch.float32)
        norms_BNH = torch.linalg.vector_norm(q_BHND, dim=-1, dtype=dtype).transpose(1, 2)
        routed_H = (~self.shared_H).to(dtype)
        count = self.num_heads - self.shared_heads
        mean_BN1 = (norms_BNH * routed_H).sum(-1, keepdim=True) / max(count, 1)
        variance_BN1 = ((norms_BNH - mean_BN1).square() * routed_H).sum(-1, keepdim=True) / max(count - 1, 1)
        # The guard stands before the root, whose gradient is infinite at 0.
        scores_BNH = norms_BNH / variance_BN1.clamp(min=torch.finfo(dtype).eps ** 2).sqrt()
        return self.route(scores_BNH, token_mask_BN)


class LinearRouter(BinaryRouter):
    """Linear scores of the hidden states, with a bias: what `mixhead.calibrate` fits in closed form, and what tunes.

    Parameters are `score_proj.weight` [H, C] and `score_proj.bias` [H]; the scores of shared heads are ignored.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, shared_heads: int, active_heads: int, num_groups: int = 1
    ) -> None:
        super().__init__(num_heads, shared_heads, active_heads, num_groups)
        self.score_proj = ScoreProjection(hidden_size, num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random scores, too."""
        self.share_first()
        nn.init.normal_(self.score_proj.weight, std=self.score_proj.in_features**-0.5)
        nn.init.zeros_(self.score_proj.bias)

    def forward(self, hidden_BNC: Tensor, q_BHND: Tensor | None = None, token_mask_BN: Tensor | None = None) -> Routing:
        del q_BHND
        proj = self.score_proj
        if can_route(proj, hidden_BNC):
            gates_BNH, selected_BNH, probs_BNH = ROUTE(
                hidden_BNC, proj.weight, proj.bias, self.shared_H, self.active_heads, self.num_groups
            )
            return self.routing(gates_BNH, selected_BNH, probs_BNH, token_mask_BN)
        return self.route(scores_of(proj, hidden_BNC), token_mask_BN)


def soft_selection(scores_BNH: Tensor, ranked_BNH: Tensor, k: int, num_groups: int = 1) -> Tensor:
    """How clearly a head is selected: sigmoid(score - threshold), the threshold halfway between k-th and next score.

    Args:
        scores_BNH: the router's scores, with gradient.
        ranked_BNH: the scores that selection used, infinite at shared heads and finite at all others.
        k: number of active heads, smaller than H.
        num_groups: as in `grouped_top_k_mask`; each group has a threshold of its own.
    """
    k_group = k // num_groups
    ranked_BNGX = ranked_BNH.detach().unflatten(-1, (num_groups, -1))
    edge_BNG2 = ranked_BNGX.topk(k_group + 1, dim=-1).values[..., -2:]
    # Where the k-th head is a shared one its rank is infinite and nothing competes: the next score is the threshold.
    threshold_BNG1 = torch.where(edge_BNG2.isinf(), edge_BNG2[..., 1:], edge_BNG2).mean(-1, keepdim=True)
    return (scores_BNH.unflatten(-1, (num_groups, -1)) - threshold_BNG1).flatten(-2).sigmoid()
