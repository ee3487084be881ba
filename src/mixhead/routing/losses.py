"""Auxiliary losses of routers. Means run over the real tokens only, those that `token_mask_BN` does not leave out."""

from __future__ import annotations

import torch
from torch import Tensor

from mixhead.errors import MixheadError


def masked_token_mean(values_BNX: Tensor, token_mask_BN: Tensor | None) -> Tensor:
    """Mean over all real tokens, at least in float32: [B, N, X] -> [X]. Without any real token the mean is 0."""
    values_BNX = values_BNX.to(torch.promote_types(values_BNX.dtype, torch.float32))
    if token_mask_BN is None:
        return values_BNX.sum((0, 1)) / max(values_BNX.shape[0] * values_BNX.shape[1], 1)
    batch, tokens = values_BNX.shape[:2]
    if token_mask_BN.dtype != torch.bool or token_mask_BN.shape not in ((batch, tokens), (1, tokens)):
        raise MixheadError(
            f"token_mask_BN must be torch.bool of shape [{batch}, {tokens}], True at real tokens, "
            f"but it is {token_mask_BN.dtype} of shape {list(token_mask_BN.shape)}."
        )
    token_mask_BN = token_mask_BN.expand(batch, tokens)
    weights_BN1 = token_mask_BN.to(values_BNX.dtype).unsqueeze(-1)
    # A padded position may hold anything, NaN too, so it is replaced and not multiplied by 0.
    total_X = torch.where(token_mask_BN.unsqueeze(-1), values_BNX, 0.0).sum((0, 1))
    return total_X / weights_BN1.sum().clamp(min=1.0)


def balance_loss(
    probs_BNH: Tensor, selected_BNH: Tensor, num_routed_heads: int, token_mask_BN: Tensor | None = None
) -> Tensor:
    """E * sum_i P_i f_i, a 0-d tensor: the load-balance loss of MoH (arXiv 2410.11842, eq. 7) in the official scaling.

    P_i is the mean router probability of head i, f_i the share of tokens that select it; the gradient flows through
    P_i only. Uniform routing gives top_k, the collapse onto the same top_k heads gives E.

    Args:
        probs_BNH: probabilities over the routed heads, 0 at shared heads.
        selected_BNH: bool, the heads that each token uses.
        num_routed_heads: E, how many heads compete.
        token_mask_BN: bool, False at padding; None means that every token is real.
    """
    mean_prob_H = masked_token_mean(probs_BNH, token_mask_BN)
    load_H = masked_token_mean(selected_BNH, token_mask_BN).detach()
    return num_routed_heads * (mean_prob_H * load_H).sum()


def switch_loss(probs_BNE: Tensor, selected_BNE: Tensor, token_mask_BN: Tensor | None = None) -> Tensor:
    """E * sum_i f_i P_i, a 0-d tensor: the load-balance loss of MoA (arXiv 2210.05144) as the official code scales it.

    f and P are the numbers of tokens and the probabilities of every expert, each divided by its own sum, so that
    uniform routing gives 1 whatever k is. The gradient flows through P only.
    """
    probability_E = masked_token_mean(probs_BNE, token_mask_BN)
    load_E = masked_token_mean(selected_BNE, token_mask_BN).detach()
    return probs_BNE.shape[-1] * (shares(probability_E) * shares(load_E)).sum()


def z_loss(logits_BNE: Tensor, token_mask_BN: Tensor | None = None) -> Tensor:
    """Mean over the tokens of (log sum_i exp(logit_i))^2, a 0-d tensor: keeps the logits of a router small."""
    return masked_token_mean(logits_BNE.logsumexp(-1, keepdim=True).square(), token_mask_BN).sum()


def cv_loss(gates_BNE: Tensor, token_mask_BN: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of the experts' summed gates, a 0-d tensor; 0 where there is one expert only."""
    if gates_BNE.shape[-1] == 1:
        return gates_BNE.new_zeros(())
    share_E = shares(masked_token_mean(gates_BNE, token_mask_BN))
    return share_E.var() / (share_E.mean().square() + 1e-10)


def shares(totals_E: Tensor) -> Tensor:
    """Totals that are not negative, divided by their sum; all 0 where that is 0."""
    return totals_E / totals_E.sum().clamp(min=1e-12)
