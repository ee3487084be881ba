"""The router of MoA (arXiv 2210.05144), what it decides, and the three losses that keep its experts in use.

Every token chooses `top_k` of E attention experts. Slot s of a token holds its s-th choice, so a choice is two small
tensors, the expert and the gate of every slot; all that is as wide as E is there for losses and statistics.

Shape legend: B batch, N tokens, C hidden size, E experts, S slots (top_k).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixhead.errors import MixheadError
from mixhead.routing.losses import cv_loss, switch_loss, z_loss
from mixhead.routing.router import Router
from mixhead.routing.scores import ScoreProjection, scores_of
from mixhead.routing.value import Routing

NORMALISATIONS = ("softmax", "renormalised", "top_k_softmax")
NOISE_FLOOR = 1e-2  # least standard deviation of the noise on a logit
SAMPLING_FLOOR = 1e-6  # every expert keeps a chance of being sampled
DENOMINATOR_FLOOR = 1e-6


@dataclass(frozen=True)
class LossWeights:
    """How much each loss of the router counts in `ExpertRouting.aux_loss`; the defaults are those of the MoA paper."""

    switch: float = 0.01
    z: float = 0.001
    cv: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in (("switch", self.switch), ("z", self.z), ("cv", self.cv)):
            if not 0.0 <= weight < float("inf"):
                raise MixheadError(f"The weight of the {name} loss must be 0 or a positive number, got {weight}.")


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertRouting(Routing):
    """A `Routing` over experts that also knows the slots of every token.

    Attributes:
        expert_BNS: int64, the expert in each slot; E where the slot is empty (at padding).
        gates_BNS: weight of each slot, 0 where it is empty.
        logits_BNE: scores of the experts, with their noise if there was any.
        loss_weights: what `aux_loss` sums up.
    """

    expert_BNS: Tensor
    gates_BNS: Tensor
    logits_BNE: Tensor
    loss_weights: LossWeights

    @classmethod
    def from_slots(
        cls,
        expert_BNS: Tensor,
        gates_BNS: Tensor,
        logits_BNE: Tensor,
        probs_BNE: Tensor,
        loss_weights: LossWeights,
        token_mask_BN: Tensor | None = None,
    ) -> ExpertRouting:
        """The routing in which each token chose these experts with these gates; padding chooses nothing."""
        experts = logits_BNE.shape[-1]
        # A place more than there are experts, for what stands in empty slots.
        gates_BNX = gates_BNS.new_zeros(*logits_BNE.shape[:2], experts + 1)
        selected_BNX = torch.zeros_like(gates_BNX, dtype=torch.bool)
        if token_mask_BN is not None:
            expert_BNS = expert_BNS.masked_fill(~token_mask_BN.unsqueeze(-1), experts)
            gates_BNS = gates_BNS.masked_fill(~token_mask_BN.unsqueeze(-1), 0.0)
        return cls(
            gates_BNH=gates_BNX.scatter(-1, expert_BNS, gates_BNS)[..., :-1],
            selected_BNH=selected_BNX.scatter(-1, expert_BNS, True)[..., :-1],
            probs_BNH=probs_BNE,
            num_routed_heads=experts,
            token_mask_BN=token_mask_BN,
            heads_per_group=expert_BNS.shape[-1] if token_mask_BN is None else None,
            expert_BNS=expert_BNS,
            gates_BNS=gates_BNS,
            logits_BNE=logits_BNE,
            loss_weights=loss_weights,
        )

    @property
    def filled_BNS(self) -> Tensor:
        """bool, True where a slot holds an expert."""
        return self.expert_BNS < self.num_routed_heads

    @property
    def switch_loss(self) -> Tensor:
        """Load balance, 1 at uniform routing; a 0-d tensor."""
        assert self.probs_BNH is not None
        return switch_loss(self.probs_BNH, self.selected_BNH, self.token_mask_BN)

    @property
    def z_loss(self) -> Tensor:
        """Keeps the logits small: (ln E)^2 where they are all 0; a 0-d tensor.

        As in the official code, and unlike the other two losses, it runs over padding too.
        """
        return z_loss(self.logits_BNE)

    @property
    def cv_loss(self) -> Tensor:
        """Squared coefficient of variation of the experts' gates, 0 where all are used alike; a 0-d tensor."""
        return cv_loss(self.gates_BNH, self.token_mask_BN)

    @property
    def aux_loss(self) -> Tensor:
        """The weighted sum of the three losses, a 0-d tensor."""
        total = self.logits_BNE.new_zeros(())
        for weight, loss in (
            (self.loss_weights.switch, "switch_loss"),
            (self.loss_weights.z, "z_loss"),
            (self.loss_weights.cv, "cv_loss"),
        ):
            if weight:
                total = total + weight * getattr(self, loss)
        return total


class ExpertRouter(Router):
    """Top-k router of MoA: G(x) = the k experts with the largest p = softmax(x W_g).

    The gates of the chosen experts are, by `normalisation`:

    - "softmax": p itself, so that they sum to less than 1 (the official code);
    - "renormalised": p / (sum of the chosen p), with no gradient through the sum;
    - "top_k_softmax": the softmax of the chosen experts' logits (JetMoE).

    Parameters are `gate_proj.weight` [E, C] (W_g), and with `noisy` also `noise_proj.weight` [E, C] (W_n); both start
    at zero, so that all experts are equally likely.

    Args:
        hidden_size: C.
        num_experts: E.
        top_k: how many experts each token uses.
        normalisation: one of `NORMALISATIONS`.
        noisy: in training, adds noise of standard deviation softplus(x W_n) + 0.01 to the logits.
        sample_k: in training, so many of the k experts are drawn by their probability, not taken in order.
        loss_weights: of the three losses of the routing.
    """

    needs_query = False

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        normalisation: str = "softmax",
        noisy: bool = False,
        sample_k: int = 0,
        loss_weights: LossWeights | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise MixheadError(f"top_k={top_k} must be at least 1 and at most num_experts={num_experts}.")
        if not 0 <= sample_k <= top_k:
            raise MixheadError(f"sample_k={sample_k} must be at least 0 and at most top_k={top_k}.")
        if normalisation not in NORMALISATIONS:
            raise MixheadError(
                f"normalisation={normalisation!r} is unknown: choose one of {', '.join(NORMALISATIONS)}."
            )
        self.num_experts, self.top_k, self.sample_k = num_experts, top_k, sample_k
        self.normalisation = normalisation
        self.loss_weights = LossWeights() if loss_weights is None else loss_weights
        self.gate_proj = ScoreProjection(hidden_size, num_experts, bias=False)
        self.noise_proj = ScoreProjection(hidden_size, num_experts, bias=False) if noisy else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero weights: every expert is equally likely."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, hidden_BNC: Tensor, q_BHND: Tensor | None = None, token_mask_BN: Tensor | None = None
    ) -> ExpertRouting:
        del q_BHND
        logits_BNE = scores_of(self.gate_proj, hidden_BNC)
        if self.noise_proj is not None and self.training:
            deviation_BNE = F.softplus(scores_of(self.noise_proj, hidden_BNC)) + NOISE_FLOOR
            logits_BNE = logits_BNE + torch.randn_like(logits_BNE) * deviation_BNE
        probs_BNE = logits_BNE.softmax(-1)
        expert_BNS = self._choose(logits_BNE, probs_BNE)
        gates_BNS = self._weigh(logits_BNE, probs_BNE, expert_BNS)
        return ExpertRouting.from_slots(expert_BNS, gates_BNS, logits_BNE, probs_BNE, self.loss_weights, token_mask_BN)

    def _choose(self, logits_BNE: Tensor, probs_BNE: Tensor) -> Tensor:
        """The experts of each token, in falling order of their logits and then those that were drawn."""
        if self.sample_k == 0 or not self.training:
            return logits_BNE.topk(self.top_k).indices
        first_BNS = logits_BNE.topk(self.top_k - self.sample_k).indices
        chances_BNE = (probs_BNE.detach() + SAMPLING_FLOOR).scatter(-1, first_BNS, 0.0)
        drawn_RS = torch.multinomial(chances_BNE.flatten(0, 1), self.sample_k)
        return torch.cat([first_BNS, drawn_RS.unflatten(0, logits_BNE.shape[:2])], -1)

    def _weigh(self, logits_BNE: Tensor, probs_BNE: Tensor, expert_BNS: Tensor) -> Tensor:
        """The gates of the chosen experts."""
        if self.normalisation == "top_k_softmax":
            return logits_BNE.gather(-1, expert_BNS).softmax(-1)
        gates_BNS = probs_BNE.gather(-1, expert_BNS)
        if self.normalisation == "renormalised":
            return gates_BNS / (gates_BNS.sum(-1, keepdim=True) + DENOMINATOR_FLOOR).detach()
        return gates_BNS
