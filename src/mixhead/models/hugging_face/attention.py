"""The function that transformers calls for the attention of a converted model, and the hook that feeds its router.

A forward pre-hook hands the attention module's own input down to this function as the keyword `router_hidden_states`;
the model hands down `routing_trace` the same way. Nothing is kept between calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mixhead.models.hugging_face.trace import RoutingTrace
from mixhead.errors import MixheadError
from mixhead.ops import head_attention

ATTENTION = "mixhead"


def register_attention() -> None:
    """Makes `attn_implementation="mixhead"` known to transformers; its masks are those of SDPA."""
    AttentionInterface.register(ATTENTION, moh_attention_forward)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def hand_down_hidden_states(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of an attention module: its router needs the hidden states that the interface does not pass."""
    hidden_BNC = args[0] if args else kwargs["hidden_states"]
    return args, {**kwargs, "router_hidden_states": hidden_BNC}


def moh_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    router_hidden_states: Tensor | None = None,
    routing_trace: RoutingTrace | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of the selected heads, under the contract of transformers' attention interface.

    Args:
        module: the attention module; it routes where it has a `moh_router`, and is dense otherwise.
        query: [B, H, N, D].
        key: [B, K, T, D].
        value: [B, K, T, D].
        attention_mask: bool or floating, [B, 1, N, T], or None.
        dropout: probability of dropping an attention weight.
        scaling: factor of the scores.
        is_causal: as in transformers; by default the module's own `is_causal`.
        router_hidden_states: [B, N, C], from `hand_down_hidden_states`.
        routing_trace: collects the routing.

    Returns:
        ([B, N, H, D], None).
    """
    router = getattr(module, "moh_router", None)
    name = getattr(module, "moh_name", "")
    observed = routing_trace is not None and routing_trace.wants_heads(name)
    if router is None and not observed:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    if router_hidden_states is None:
        raise MixheadError(f"{name}: the attention module's hidden states did not reach its router.")
    token_mask_BN = real_tokens_BN(attention_mask, query.shape[2], key.shape[2])
    if observed:
        assert routing_trace is not None
        dense_BNHD, _ = sdpa_attention_forward(module, query, key, value, attention_mask, 0.0, scaling, is_causal, **kwargs)
        routing_trace.observe(name, router_hidden_states, query, dense_BNHD.transpose(1, 2), token_mask_BN)
        return dense_BNHD, None
    routing = router(router_hidden_states, query, token_mask_BN)
    if routing_trace is not None:
        routing_trace.record(name, routing)
    if dropout > 0.0:
        # No sparse engine drops attention weights; the stock kernel does, on all heads.
        dense_BNHD, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        gated_BNHD = dense_BNHD * routing.gates_BNH.to(dense_BNHD.dtype).unsqueeze(-1)
        return torch.where(routing.selected_BNH.unsqueeze(-1), gated_BNHD, 0.0), None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out_BHND = head_attention(
        query,
        key,
        value,
        routing,
        causal=causal and query.shape[2] > 1 and attention_mask is None,
        scale=scaling,
        attn_mask=attention_mask,
    )
    return out_BHND.transpose(1, 2).contiguous(), None


def real_tokens_BN(attention_mask: Tensor | None, num_queries: int, num_keys: int) -> Tensor | None:
    """bool [B, N], False at padding, read off the attention mask; None where every token is real.

    In self-attention a real token may attend to itself and padding may not. Where there are more keys than queries (a
    cache, cross-attention) a token counts as real when it may attend to anything.
    """
    if attention_mask is None or attention_mask.dim() != 4:
        return None
    allowed_BNT = attention_mask[:, 0] if attention_mask.dtype == torch.bool else attention_mask[:, 0] > -1.0
    if num_queries == num_keys and allowed_BNT.shape[1] == num_queries:
        return allowed_BNT.diagonal(dim1=1, dim2=2)
    return allowed_BNT.any(-1).expand(-1, num_queries)
