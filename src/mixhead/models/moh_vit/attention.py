"""The attention modules of MoH-ViT: aggregated attention in all stages but the last, global attention there.

Both are cosine attention whose scores are scaled by a learned temperature and by the logarithm of the number of keys,
with a learned query embedding and continuous relative position biases (TransNeXt, arXiv 2311.17132), and both multiply
each head by its gate before the output projection (MoH, arXiv 2410.11842, eq. 4).

Shape legend: B batch, N = Y * X queries, T pooled keys, C hidden size, H heads, D head dim, L window positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixhead.models.moh_vit.positions import RelativePositions, Size
from mixhead.ops import RelativeBias, aggregated_attention, head_attention
from mixhead.plain import dtype_of, is_plain
from mixhead.routing import Routing, TwoStageRouter

POSITION_WIDTH = 512


class PositionBias(nn.Module):
    """Continuous relative position bias: a small MLP from distances to one bias per head."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, POSITION_WIDTH)
        self.fc2 = nn.Linear(POSITION_WIDTH, num_heads)
        self._known: tuple[RelativePositions, list[Tensor], Tensor] | None = None

    def forward(self, positions: RelativePositions) -> RelativeBias:
        """The bias of every pair of a query and a key."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self.is_plain():
            return RelativeBias(self.table(positions), positions.row_YU, positions.column_XV)
        # Without gradients the last table is kept, with a copy of the weights that made it: they tell for certain,
        # however they were changed, whether it still holds.
        weights: list[Tensor] = list(self.parameters())
        if self._known is None or self._known[0] is not positions or not same_tensors(self._known[1], weights):
            self._known = positions, [weight.clone() for weight in weights], self.table(positions)
        return RelativeBias(self._known[2], positions.row_YU, positions.column_XV)

    def is_plain(self) -> bool:
        """Whether the parameters tell all that the table depends on."""
        return all(is_plain(layer, nn.Linear) for layer in (self.fc1, self.fc2))

    def table(self, positions: RelativePositions) -> Tensor:
        """The bias of every distance, [H, R, S]."""
        bias_RSH = self.fc2(F.relu(self.fc1(positions.distances_RS2.to(dtype_of(self)))))
        return bias_RSH.permute(2, 0, 1).contiguous()


class CosineAttention(nn.Module):
    """What both kinds of attention have in common.

    Args:
        hidden_size: C.
        num_heads: H, a divisor of C.
        router: decides which heads a token uses; None for a dense model.
    """

    def __init__(self, hidden_size: int, num_heads: int, router: TwoStageRouter | None) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.temperature = nn.Parameter(torch.empty(num_heads))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, self.head_dim))
        self.position_bias = PositionBias(num_heads)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.moh_router = router
        self.moh_name = ""

    def route(self, hidden_BNC: Tensor) -> Routing | None:
        """The routing of these hidden states, where there is a router."""
        return None if self.moh_router is None else self.moh_router(hidden_BNC)

    def routing_labels(self, hidden_BNC: Tensor, size: Size, *_args: object, **_kwargs: object) -> dict[str, Tensor]:
        """Where each token stands on the map, for `mixhead.record_routing`."""
        _rows, columns = size
        index_1N = torch.arange(hidden_BNC.shape[1]).unsqueeze(0)
        return {"y": index_1N // columns, "x": index_1N % columns}

    def split_heads(self, states_BNX: Tensor) -> Tensor:
        """[B, N, heads * D] -> [B, heads, N, D]."""
        return states_BNX.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def join_heads(self, heads_BHND: Tensor) -> Tensor:
        """[B, H, N, D] -> [B, N, C], through the output projection."""
        return self.o_proj(heads_BHND.transpose(1, 2).flatten(2))


class AggregatedAttention(CosineAttention):
    """Attention to a local window and to the pooled map, under one softmax.

    Args:
        hidden_size: C.
        num_heads: H, a divisor of C.
        router: decides which heads a token uses; None for a dense model.
        window_size: side of the window.
        qkv_bias: whether queries, keys and values have a bias.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, router: TwoStageRouter | None, window_size: int, qkv_bias: bool
    ) -> None:
        super().__init__(hidden_size, num_heads, router)
        window = window_size**2
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.kv_proj = nn.Linear(hidden_size, 2 * hidden_size, bias=qkv_bias)
        self.pool_proj = nn.Linear(hidden_size, hidden_size)
        self.pool_norm = nn.LayerNorm(hidden_size)  # with PyTorch's eps of 1e-5, unlike the norms of blocks and stages
        self.local_bias = nn.Parameter(torch.empty(num_heads, window))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, self.head_dim, window))
        self.learnable_bias = nn.Parameter(torch.empty(num_heads, window))

    def forward(
        self, hidden_BNC: Tensor, size: Size, pooled: Size, positions: RelativePositions
    ) -> tuple[Tensor, Routing | None]:
        """Output [B, N, C] and routing for a map of `size`, whose pooled keys form a map of size `pooled`."""
        routing = self.route(hidden_BNC)
        k_BHND, v_BHND = self.split_heads(self.kv_proj(hidden_BNC)).chunk(2, dim=1)
        k_BHTD, v_BHTD = self.split_heads(self.kv_proj(self.pool(hidden_BNC, size, pooled))).chunk(2, dim=1)
        heads_BHND = aggregated_attention(
            self.split_heads(self.q_proj(hidden_BNC)),
            k_BHND,
            v_BHND,
            k_BHTD,
            v_BHTD,
            routing,
            size=size,
            query_embedding_HD=self.query_embedding,
            temperature_H=F.softplus(self.temperature),
            local_bias_HL=self.local_bias,
            pool_bias=self.position_bias(positions),
            learnable_tokens_HDL=self.learnable_tokens,
            learnable_bias_HL=self.learnable_bias,
        )
        return self.join_heads(heads_BHND), routing

    def pool(self, hidden_BNC: Tensor, size: Size, pooled: Size) -> Tensor:
        """The states that pooled keys and values come from, [B, T, C]."""
        map_BCYX = F.gelu(self.pool_proj(hidden_BNC)).transpose(1, 2).unflatten(2, size)
        return self.pool_norm(F.adaptive_avg_pool2d(map_BCYX, pooled).flatten(2).transpose(1, 2))


class GlobalAttention(CosineAttention):
    """Attention to every token of the map.

    Args:
        hidden_size: C.
        num_heads: H, a divisor of C.
        router: decides which heads a token uses; None for a dense model.
        qkv_bias: whether queries, keys and values have a bias.
    """

    def __init__(self, hidden_size: int, num_heads: int, router: TwoStageRouter | None, qkv_bias: bool) -> None:
        super().__init__(hidden_size, num_heads, router)
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)

    def forward(
        self, hidden_BNC: Tensor, size: Size, pooled: Size, positions: RelativePositions
    ) -> tuple[Tensor, Routing | None]:
        """Output [B, N, C] and routing; the sizes are those of aggregated attention, and equal."""
        del size, pooled
        routing = self.route(hidden_BNC)
        q_BHND, k_BHND, v_BHND = self.split_heads(self.qkv_proj(hidden_BNC)).chunk(3, dim=1)
        factor_H11 = F.softplus(self.temperature).view(-1, 1, 1) * math.log(hidden_BNC.shape[1])
        q_BHND = (F.normalize(q_BHND, dim=-1) + self.query_embedding.unsqueeze(1)) * factor_H11
        bias_1HNT = self.position_bias(positions).pairs_HNT().unsqueeze(0)
        heads_BHND = head_attention(
            q_BHND.to(v_BHND.dtype),
            F.normalize(k_BHND, dim=-1).to(v_BHND.dtype),
            v_BHND,
            all_heads(v_BHND) if routing is None else routing,
            scale=1.0,
            attn_mask=bias_1HNT,
        )
        return self.join_heads(heads_BHND), routing


def same_tensors(first: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two lists hold the same numbers, in the same dtypes and on the same devices."""
    return all(a.dtype == b.dtype and a.device == b.device and a.equal(b) for a, b in zip(first, others, strict=True))


def all_heads(v_BHND: Tensor) -> Routing:
    """Every token uses every head, with the weight 1."""
    batch, heads, tokens, _head_dim = v_BHND.shape
    gates_BNH = v_BHND.new_ones(batch, tokens, heads)
    return Routing(gates_BNH, gates_BNH.bool())
