"""Masks in the forms that the implementations need. The causal convention is set here, once."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask_NT(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """bool, True where a query may attend: the last query sees the last key, as in decoding with a cache."""
    position_N1 = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(-1)
    return torch.arange(num_keys, device=device) <= position_N1


def attended_BHNT(q_BHND: Tensor, k_BKTD: Tensor, attn_mask: Tensor | None, causal: bool) -> Tensor | None:
    """Where attention is allowed, broadcastable to [B, H, N, T]; None where everything is."""
    allowed = attn_mask if attn_mask is not None and attn_mask.dtype == torch.bool else None
    if causal:
        causal_NT = causal_mask_NT(q_BHND.shape[2], k_BKTD.shape[2], q_BHND.device)
        allowed = causal_NT if allowed is None else allowed & causal_NT
    return allowed


def with_causal(attn_mask: Tensor | None, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
    """The mask joined with the causal one. A single query sees every key, so nothing has to be joined for it."""
    if num_queries == 1:
        return attn_mask
    causal_NT = causal_mask_NT(num_queries, num_keys, device)
    if attn_mask is None:
        return causal_NT
    if attn_mask.dtype == torch.bool:
        return attn_mask & causal_NT
    return attn_mask.masked_fill(~causal_NT, -torch.inf)
