"""The attention of a DiT block: of the heads that a token selects where there is a router, of all heads where not.

Shape legend: B batch, N tokens, C hidden size, H heads, D head dim.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixhead.models.hugging_face import LayerHeads, RoutingTrace
from mixhead.nn import make_router, project_output, project_queries
from mixhead.ops import head_attention
from mixhead.routing import Routing


class DiTAttention(nn.Module):
    """Self-attention with per-token heads (MoH, arXiv 2410.11842, eq. 4), or plain multi-head attention.

    Heads that are not selected cost neither their query, nor their attention, nor their share of the output projection.

    Args:
        hidden_size: C.
        num_heads: H.
        head_dim: D; H * D may differ from C.
        qkv_bias: whether the projections of queries, keys and values have a bias.
    """

    # Mean output of every head [H, D], which stands in for a head that a token skips; set by calibration.
    moh_skipped: Tensor | None

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, width, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, width, bias=qkv_bias)
        self.o_proj = nn.Linear(width, hidden_size)
        self.moh_router: nn.Module | None = None
        self.moh_name = ""
        self.register_buffer("moh_skipped", None)

    def set_heads(self, heads: LayerHeads, router: str) -> None:
        """A fresh router of that kind for so many heads, in dtype and on the device of the weights.

        Routers with 0 / 1 gates get the constant of skipped heads, 0 until calibration measures it.
        """
        weight = self.o_proj.weight
        top_k = heads.active_heads - heads.shared_heads
        made = make_router(router, self.hidden_size, heads.num_heads, heads.shared_heads, top_k)
        self.moh_router = made.to(device=weight.device, dtype=weight.dtype).train(self.training)
        self.moh_skipped = None if router == "two_stage" else weight.new_zeros(self.num_heads, self.head_dim)

    def remove_router(self) -> None:
        """All heads again."""
        self.moh_router = self.moh_skipped = None

    def forward(
        self, hidden_BNC: Tensor, routing_trace: RoutingTrace | None = None, impl: str = "auto"
    ) -> tuple[Tensor, Routing | None]:
        """Output [B, N, C] and the routing, None where all heads are used.

        Args:
            hidden_BNC: hidden states.
            routing_trace: shown the routing, or all heads where it asks for them.
            impl: the engine, see `mixhead.ops.head_attention`.
        """
        observed = routing_trace is not None and routing_trace.wants_heads(self.moh_name)
        routed = routing_trace is None or routing_trace.routes(self.moh_name)
        if self.moh_router is None or observed or not routed:
            return self.all_heads(hidden_BNC, routing_trace if observed else None), None
        if self.moh_router.needs_query:
            q_BHND = self.split_heads(self.q_proj(hidden_BNC))
            routing: Routing = self.moh_router(hidden_BNC, q_BHND)
        else:
            routing = self.moh_router(hidden_BNC)
            q_BHND = project_queries(self.q_proj, hidden_BNC, routing)
        if routing_trace is not None:
            routing_trace.record(self.moh_name, routing)
        k_BHND, v_BHND = self.split_heads(self.k_proj(hidden_BNC)), self.split_heads(self.v_proj(hidden_BNC))
        heads_BHND = head_attention(q_BHND, k_BHND, v_BHND, routing, impl=impl)
        output_BNC = project_output(self.o_proj, heads_BHND, routing)
        return output_BNC + self.stand_in(routing, output_BNC), routing

    def stand_in(self, routing: Routing, output_BNC: Tensor) -> Tensor | float:
        """What the mean outputs of the skipped heads contribute: [B, N, C], or 0 where there are none."""
        if self.moh_skipped is None:
            return 0.0
        weight_HDC = self.o_proj.weight.T.unflatten(0, (self.num_heads, self.head_dim))
        mean_HC = (self.moh_skipped.to(weight_HDC.dtype).unsqueeze(1) @ weight_HDC).squeeze(1)
        return (~routing.selected_BNH).to(output_BNC.dtype) @ mean_HC.to(output_BNC.dtype)

    def all_heads(self, hidden_BNC: Tensor, observer: RoutingTrace | None = None) -> Tensor:
        """Plain multi-head attention, [B, N, C]; shown to an observer."""
        q_BHND, k_BHND, v_BHND = (self.split_heads(p(hidden_BNC)) for p in (self.q_proj, self.k_proj, self.v_proj))
        heads_BHND = F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND)
        if observer is not None:
            observer.observe(self.moh_name, hidden_BNC, q_BHND, heads_BHND, None)
        return self.o_proj(heads_BHND.transpose(1, 2).flatten(2))

    def split_heads(self, states_BNX: Tensor) -> Tensor:
        """[B, N, H * D] -> [B, H, N, D]."""
        return states_BNX.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
