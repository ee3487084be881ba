"""`MixtureOfHeadAttention`: multi-head attention whose heads are chosen per token, a plain module for any model.

Shape legend: B batch, N queries, T keys, C hidden size, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mixhead.errors import MixheadError
from mixhead.ops import explain_projection, head_attention, project_from_heads, project_to_heads, weight_by_head
from mixhead.ops.skipped import fill_skipped
from mixhead.ops.stock import stock_attention
from mixhead.plain import is_plain, place_of
from mixhead.routing import Routing, router_kind


class KeyValueCache(Protocol):
    """What `past_key_values` must be able to do; every cache of transformers is one."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Appends keys and values [B, K, N, D] of one layer and returns all of that layer, [B, K, T, D]."""
        ...


class MixtureOfHeadAttention(nn.Module):
    """Mixture-of-head attention (MoH, arXiv 2410.11842, eq. 4) for self- and cross-attention.

    Args:
        hidden_size: C, width of the queries' hidden states and of the output.
        num_heads: H query heads.
        shared_heads: how many heads every token uses (the first ones).
        top_k: how many of the others each token uses.
        num_key_value_heads: K, a divisor of H (grouped-query attention); H by default.
        head_dim: D; hidden_size / num_heads by default.
        key_value_size: width of the states that keys and values come from; `hidden_size` by default.
        bias: whether the query, key and value projections have a bias; the output projection always has one.
        router: one of `mixhead.routing.ROUTERS`: "two_stage" (learned, weighted gates), "query_norm" (no parameters,
            0 / 1) or "linear" (0 / 1); None for plain multi-head attention, which `set_router` can change later.
        group_balanced: equally many active heads in every key-value group ("query_norm" and "linear" only).

    Attributes:
        router: decides which heads a token uses; None where every token uses all.
        skipped_HD: what stands in for the output of a head that a token skips, or None: a constant, so that a skipped
            head still costs nothing.
    """

    router: Any
    skipped_HD: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        shared_heads: int,
        top_k: int,
        *,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        key_value_size: int | None = None,
        bias: bool = True,
        router: str | None = "two_stage",
        group_balanced: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "num_key_value_heads": num_key_value_heads,
            "head_dim": head_dim,
            "key_value_size": key_value_size,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise MixheadError(f"{name} must be at least 1, got {size}.")
        if head_dim is None and hidden_size % num_heads:
            raise MixheadError(
                f"hidden_size={hidden_size} is no multiple of num_heads={num_heads}: give head_dim explicitly."
            )
        self.num_heads = num_heads
        self.num_key_value_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        if num_heads % self.num_key_value_heads:
            raise MixheadError(f"num_key_value_heads={self.num_key_value_heads} must divide num_heads={num_heads}.")
        key_value_size = hidden_size if key_value_size is None else key_value_size
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(key_value_size, self.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(key_value_size, self.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size)
        self.router = None
        self.register_buffer("skipped_HD", None)
        if router is not None:
            self.set_router(router, shared_heads, top_k, group_balanced=group_balanced)

    def set_router(self, kind: str, shared_heads: int, top_k: int, *, group_balanced: bool = False) -> None:
        """A fresh router of that kind, where this layer computes and in its dtype."""
        device, dtype = place_of(self.o_proj, self)
        num_groups = self.num_key_value_heads if group_balanced else 1
        make = router_kind(kind, num_groups > 1).make
        made = make(self.q_proj.in_features, self.num_heads, shared_heads, top_k, num_groups)
        self.router = made.to(device=device, dtype=dtype).train(self.training)

    def reset_skipped(self) -> None:
        """Lets zeros stand in for skipped heads, until calibration measures their mean outputs."""
        device, dtype = place_of(self.o_proj, self)
        self.skipped_HD = torch.zeros(self.num_heads, self.head_dim, device=device, dtype=dtype)

    def remove_router(self) -> None:
        """All heads again."""
        self.router = self.skipped_HD = None

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        token_mask_BN: Tensor | None = None,
        causal: bool = False,
        past_key_values: KeyValueCache | None = None,
        layer_idx: int = 0,
        return_routing: bool = False,
        impl: str = "auto",
    ) -> Tensor | tuple[Tensor, Routing | None]:
        """Attends from `hidden_states` to `key_value_states`, or to itself where there are none.

        Args:
            hidden_states: [B, N, C].
            key_value_states: [B, T, key_value_size] for cross-attention.
            attn_mask: bool (True = may attend) or floating, broadcastable to [B, H, N, T].
            token_mask_BN: bool, False at padded queries: they do not count in the routing's loss and statistics.
            causal: every query sees the keys up to its own position.
            past_key_values: a cache that keys and values are appended to (self-attention only).
            layer_idx: this layer's place in the cache.
            return_routing: whether to return the `Routing` beside the output.
            impl: the engine, see `mixhead.ops.head_attention`.

        Returns:
            The output [B, N, C], or (output, routing); the routing is None where there is no router.
        """
        if past_key_values is not None and key_value_states is not None:
            raise MixheadError("past_key_values goes with self-attention: give either it or key_value_states.")
        check_states("hidden_states", hidden_states, self.q_proj.in_features)
        if key_value_states is not None:
            check_states("key_value_states", key_value_states, self.k_proj.in_features)
        source = hidden_states if key_value_states is None else key_value_states
        routing, q_BHND = self._route(hidden_states, token_mask_BN)
        k_BKTD = self._split_heads(self.k_proj(source))
        v_BKTD = self._split_heads(self.v_proj(source))
        if past_key_values is not None:
            k_BKTD, v_BKTD = past_key_values.update(k_BKTD, v_BKTD, layer_idx)
        if routing is None:
            output_BNC = self._all_heads(q_BHND, k_BKTD, v_BKTD, causal, attn_mask)
        else:
            out_BHND = head_attention(q_BHND, k_BKTD, v_BKTD, routing, causal=causal, attn_mask=attn_mask, impl=impl)
            output_BNC = self._project_output(out_BHND, routing)
        return (output_BNC, routing) if return_routing else output_BNC

    def _route(self, hidden_BNC: Tensor, token_mask_BN: Tensor | None) -> tuple[Routing | None, Tensor]:
        """The routing, and the queries of the heads that it selects at least."""
        if self.router is None:
            return None, self._split_heads(self.q_proj(hidden_BNC))
        if self.router.needs_query:
            q_BHND = self._split_heads(self.q_proj(hidden_BNC))
            return self.router(hidden_BNC, q_BHND, token_mask_BN), q_BHND
        routing: Routing = self.router(hidden_BNC, None, token_mask_BN)
        return routing, project_queries(self.q_proj, hidden_BNC, routing)

    def _all_heads(
        self, q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, causal: bool, attn_mask: Tensor | None
    ) -> Tensor:
        """Plain multi-head attention, [B, N, C]."""
        out_BHND = stock_attention(
            q_BHND, k_BKTD, v_BKTD, causal=causal, scale=self.head_dim**-0.5, attn_mask=attn_mask
        )
        return self.o_proj(out_BHND.transpose(1, 2).flatten(2))

    def _project_output(self, out_BHND: Tensor, routing: Routing) -> Tensor:
        """The output projection of the selected heads, and of the constants of the others."""
        if self.skipped_HD is None:
            return project_output(self.o_proj, out_BHND, routing)
        if is_plain(self.o_proj, nn.Linear):
            output_BNC = project_output(self.o_proj, out_BHND, routing)
            return output_BNC + self._stand_in(routing, output_BNC)
        filled_BNHD = fill_skipped(out_BHND.transpose(1, 2), routing.selected_BNH, self.skipped_HD)
        return self.o_proj(filled_BNHD.flatten(2))

    def _stand_in(self, routing: Routing, output_BNC: Tensor) -> Tensor:
        """What the constants of the skipped heads contribute to the output, [B, N, C]."""
        assert self.skipped_HD is not None
        weight_HDC = weight_by_head(self.o_proj.weight, self.num_heads)
        skipped_HC = (self.skipped_HD.to(weight_HDC.dtype).unsqueeze(1) @ weight_HDC).squeeze(1)
        return (~routing.selected_BNH).to(output_BNC.dtype) @ skipped_HC.to(output_BNC.dtype)

    def _split_heads(self, states_BNX: Tensor) -> Tensor:
        return states_BNX.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def check_states(name: str, states_BNC: Tensor, size: int) -> None:
    """Raises where hidden states are not [batch, tokens, size]."""
    if states_BNC.dim() != 3 or states_BNC.shape[-1] != size:
        raise MixheadError(f"{name} must be [batch, tokens, {size}], got {list(states_BNC.shape)}.")


def project_queries(proj: nn.Linear, hidden_BNC: Tensor, routing: Routing) -> Tensor:
    """Queries [B, H, N, D] of the selected heads at least; `head_attention` reads no others."""
    heads = routing.selected_BNH.shape[-1]
    if is_plain(proj, nn.Linear):
        weight_HDC = proj.weight.unflatten(0, (heads, -1))
        impl = explain_projection(hidden_BNC, weight_HDC, routing.selected_BNH).impl
        if impl != "dense":
            bias_HD = None if proj.bias is None else proj.bias.unflatten(0, (heads, -1))
            return project_to_heads(hidden_BNC, weight_HDC, bias_HD, routing.selected_BNH, impl=impl)
    return proj(hidden_BNC).unflatten(-1, (heads, -1)).transpose(1, 2)


def project_output(proj: nn.Linear, out_BHND: Tensor, routing: Routing) -> Tensor:
    """The output projection of heads that carry their gates, and are 0 where they are not selected."""
    if is_plain(proj, nn.Linear):
        weight_HDC = weight_by_head(proj.weight, out_BHND.shape[1])
        impl = explain_projection(out_BHND, weight_HDC, routing.selected_BNH).impl
        if impl != "dense":
            return project_from_heads(out_BHND, weight_HDC, proj.bias, routing.selected_BNH, impl=impl)
    return proj(out_BHND.transpose(1, 2).flatten(2))
