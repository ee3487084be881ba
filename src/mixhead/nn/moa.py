"""`MixtureOfAttentionHeads`: attention whose heads are experts that every token chooses, a plain module for any model.

Shape legend: B batch, N queries, T keys, C hidden size, E experts, S slots (chosen experts of a token), K key-value
heads of an expert, D head dim, X = K D width of an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixhead.errors import MixheadError
from mixhead.nn.moh import KeyValueCache, check_states
from mixhead.ops import head_attention, project_from_slots, project_to_slots
from mixhead.ops.masks import with_causal
from mixhead.routing import ExpertRouter, ExpertRouting, LossWeights, Routing


class MixtureOfAttentionHeads(nn.Module):
    """Mixture of attention heads (MoA, arXiv 2210.05144) for self- and cross-attention.

    y_t = sum over the chosen experts i of gate_i softmax(q_t W^q_i (K W^k)^T / sqrt(D)) V W^v W^o_i. Every expert has a
    query and an output projection of its own; keys and values are made once, for all experts together.

    Parameters: `q_experts` [E, C, X], `o_experts` [E, X, C], `kv_proj.weight` [2 X, key_value_size] (keys, then values)
    and those of `router`; none has a bias. An expert has `num_key_value_heads` heads of `head_dim`, X in all (one in
    MoA; 16 in JetMoE).

    Args:
        hidden_size: C, width of the queries' hidden states and of the output.
        num_experts: E.
        top_k: how many experts each token uses.
        head_dim: D.
        num_key_value_heads: K, key-value heads, and so heads of each expert.
        key_value_size: width of the states that keys and values come from; `hidden_size` by default.
        normalisation: gates of the chosen experts, "softmax", "renormalised" or "top_k_softmax"; see `ExpertRouter`.
        noisy: whether the router adds learned noise in training.
        sample_k: how many of the `top_k` experts are drawn at random in training.
        loss_weights: what `routing.aux_loss` sums up.
        dropout: probability of dropping an attention weight in training; the stock kernel runs then.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        head_dim: int,
        *,
        num_key_value_heads: int = 1,
        key_value_size: int | None = None,
        normalisation: str = "softmax",
        noisy: bool = False,
        sample_k: int = 0,
        loss_weights: LossWeights | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        key_value_size = hidden_size if key_value_size is None else key_value_size
        sizes = {
            "hidden_size": hidden_size,
            "num_experts": num_experts,
            "head_dim": head_dim,
            "num_key_value_heads": num_key_value_heads,
            "key_value_size": key_value_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise MixheadError(f"{name} must be at least 1, got {size}.")
        if not 0.0 <= dropout < 1.0:
            raise MixheadError(f"dropout must be at least 0 and less than 1, got {dropout}.")
        self.num_experts, self.top_k, self.head_dim = num_experts, top_k, head_dim
        self.num_key_value_heads, self.dropout = num_key_value_heads, dropout
        width = num_key_value_heads * head_dim
        self.q_experts = nn.Parameter(torch.empty(num_experts, hidden_size, width))
        self.o_experts = nn.Parameter(torch.empty(num_experts, width, hidden_size))
        self.kv_proj = nn.Linear(key_value_size, 2 * width, bias=False)
        self.router = ExpertRouter(
            hidden_size,
            num_experts,
            top_k,
            normalisation=normalisation,
            noisy=noisy,
            sample_k=sample_k,
            loss_weights=loss_weights,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform for each expert, with gain 1 / sqrt(2) for keys and values, zero for the router (official)."""
        for expert in (*self.q_experts, *self.o_experts):
            nn.init.xavier_uniform_(expert)
        for proj_XC in self.kv_proj.weight.chunk(2):
            nn.init.xavier_uniform_(proj_XC, gain=2**-0.5)
        self.router.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key_value: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        return_routing: bool = True,
        *,
        causal: bool = False,
        past_key_values: KeyValueCache | None = None,
        layer_idx: int = 0,
        keys_and_values: tuple[Tensor, Tensor] | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        impl: str = "auto",
    ) -> Tensor | tuple[Tensor, ExpertRouting]:
        """Attends from `query` to `key_value`, or to itself where there is none.

        Args:
            query: hidden states [B, N, C].
            key_value: hidden states [B, T, key_value_size] for cross-attention.
            query_padding_mask: bool [B, N], True at padding: it chooses no expert, counts in no loss, and gets 0.
            key_padding_mask: bool [B, T], True at keys that nobody may attend to; those of a cache are counted in.
            attn_mask: bool (True = may attend) or floating (added to the scores), broadcastable to [B, 1, N, T].
            return_routing: whether to return the routing, with the losses of the router, beside the output.
            causal: every query sees the keys up to its own position.
            past_key_values: a cache that keys and values are appended to (self-attention only).
            layer_idx: this layer's place in the cache.
            keys_and_values: what `project_keys_and_values` made of `key_value` in an earlier call, in its place.
            position_embeddings: (cos, sin) of a rotary embedding of queries and new keys, [1 or B, N, D] each.
            impl: the engine of attention, see `mixhead.ops.head_attention`.

        Returns:
            (output [B, N, C], routing), or the output alone.

        Raises:
            MixheadError: where arguments do not fit each other or the layer.
        """
        if sum(given is not None for given in (key_value, keys_and_values, past_key_values)) > 1:
            raise MixheadError(
                "key_value, keys_and_values and past_key_values exclude each other: the first two are cross-attention, "
                "and the last one is self-attention."
            )
        check_states("query", query, self.q_experts.shape[1])
        check_padding("query_padding_mask", query_padding_mask, query.shape[0], query.shape[1])
        token_mask_BN = None if query_padding_mask is None else ~query_padding_mask
        routing: ExpertRouting = self.router(query, None, token_mask_BN)
        q_BNSX = project_to_slots(query, self.q_experts.mT, routing.expert_BNS)
        if keys_and_values is None:
            keys_and_values = self.project_keys_and_values(query if key_value is None else key_value)
        k_BKTD, v_BKTD = keys_and_values
        if position_embeddings is not None:
            k_BKTD = rotate(k_BKTD, *(x.unsqueeze(1) for x in position_embeddings))
        if past_key_values is not None:
            k_BKTD, v_BKTD = past_key_values.update(k_BKTD, v_BKTD, layer_idx)
        check_padding("key_padding_mask", key_padding_mask, k_BKTD.shape[0], k_BKTD.shape[2])
        out_BNSX = slot_attention(
            q_BNSX,
            k_BKTD,
            v_BKTD,
            routing.gates_BNS,
            routing.filled_BNS,
            causal=causal,
            attn_mask=joined_mask(attn_mask, key_padding_mask),
            position_embeddings=position_embeddings,
            dropout=self.dropout if self.training else 0.0,
            impl=impl,
        )
        output_BNC = project_from_slots(out_BNSX, self.o_experts, routing.expert_BNS)
        return (output_BNC, routing) if return_routing else output_BNC

    def project_keys_and_values(self, states_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of all experts, [B, K, T, D] each; cross-attention may keep them for later queries."""
        check_states("key_value", states_BTC, self.kv_proj.in_features)
        k_BTX, v_BTX = self.kv_proj(states_BTC).chunk(2, -1)
        by_head = (self.num_key_value_heads, self.head_dim)
        return k_BTX.unflatten(-1, by_head).transpose(1, 2), v_BTX.unflatten(-1, by_head).transpose(1, 2)


def slot_attention(
    q_BNSX: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    gates_BNS: Tensor,
    filled_BNS: Tensor,
    *,
    causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Attention of what stands in the slots, times the gates: each expert's K heads to the K key-value heads.

    Args:
        q_BNSX: queries in slots.
        k_BKTD: keys; head j of every expert attends to key-value head j.
        v_BKTD: values.
        gates_BNS: weights of the slots.
        filled_BNS: bool, False where a slot is empty.
        causal: a query sees the keys up to its own position; the last query sees the last key.
        attn_mask: bool (True = may attend) or floating, broadcastable to [B, 1, N, T].
        scale: factor of the scores; 1 / sqrt(D) by default.
        position_embeddings: (cos, sin) of a rotary embedding of the queries, [1 or B, N, D] each.
        dropout: probability of dropping an attention weight.
        impl: the engine, see `mixhead.ops.head_attention`.

    Returns:
        [B, N, S, X], 0 in empty slots.
    """
    kv_heads, slots = k_BKTD.shape[1], q_BNSX.shape[2]
    # The heads that share a key-value head, one of each slot, stand side by side: J = K S of them.
    q_BKSND = q_BNSX.unflatten(-1, (kv_heads, -1)).permute(0, 3, 2, 1, 4)
    if position_embeddings is not None:
        q_BKSND = rotate(q_BKSND, *(x[:, None, None] for x in position_embeddings))
    q_BJND = q_BKSND.flatten(1, 2)
    heads = Routing(
        gates_BNH=gates_BNS.repeat(1, 1, kv_heads) if kv_heads > 1 else gates_BNS,
        selected_BNH=filled_BNS.repeat(1, 1, kv_heads) if kv_heads > 1 else filled_BNS,
    )
    if dropout > 0.0:
        out_BJND = attention_with_dropout(q_BJND, k_BKTD, v_BKTD, heads, causal, attn_mask, scale, dropout)
    else:
        out_BJND = head_attention(
            q_BJND, k_BKTD, v_BKTD, heads, causal=causal, attn_mask=attn_mask, scale=scale, impl=impl
        )
    return out_BJND.unflatten(1, (kv_heads, slots)).permute(0, 3, 2, 1, 4).flatten(3)


def attention_with_dropout(
    q_BJND: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    routing: Routing,
    causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """`head_attention` with dropout, by the stock kernel: no engine of ours drops attention weights."""
    if causal:
        attn_mask = with_causal(attn_mask, q_BJND.shape[2], k_BKTD.shape[2], q_BJND.device)
    grouped = q_BJND.shape[1] != k_BKTD.shape[1]
    out_BJND = F.scaled_dot_product_attention(
        q_BJND, k_BKTD, v_BKTD, attn_mask=attn_mask, dropout_p=dropout, scale=scale, enable_gqa=grouped
    )
    gated_BJND = out_BJND * routing.gates_BNH.to(out_BJND.dtype).transpose(1, 2).unsqueeze(-1)
    return torch.where(routing.selected_BNH.transpose(1, 2).unsqueeze(-1), gated_BJND, 0.0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the last axis, in which number i and number i + D/2 are a pair, as in transformers."""
    first, second = x.chunk(2, -1)
    (cos_first, cos_second), (sin_first, sin_second) = cos.chunk(2, -1), sin.chunk(2, -1)
    turned_first = torch.addcmul(first * cos_first, second, sin_first, value=-1)
    return torch.cat([turned_first, torch.addcmul(second * cos_second, first, sin_second)], -1)


def joined_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    """The attention mask with the padded keys left out."""
    if key_padding_mask is None:
        return attn_mask
    padded_B11T = key_padding_mask[:, None, None]
    if attn_mask is None:
        return ~padded_B11T
    if attn_mask.dtype == torch.bool:
        return attn_mask & ~padded_B11T
    return attn_mask.masked_fill(padded_B11T, -torch.inf)


def check_padding(name: str, mask_BX: Tensor | None, batch: int, tokens: int) -> None:
    """Raises where a padding mask is there and not bool [batch, tokens]."""
    if mask_BX is not None and (mask_BX.dtype != torch.bool or mask_BX.shape != (batch, tokens)):
        raise MixheadError(
            f"{name} must be torch.bool of shape [{batch}, {tokens}], True at padding, but it is {mask_BX.dtype} of "
            f"shape {list(mask_BX.shape)}."
        )
