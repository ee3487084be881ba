"""What `benchmarks/moa.py` compares with: mixture of attention heads in the form that the papers' code has.

`LoopAttention` computes what `mixhead.nn.MixtureOfAttentionHeads` computes, with the same parameters, by the steps of
the published code: tokens are sorted by expert, the sizes of the experts are read by the host, a loop multiplies the
rows of one expert after the other, results are added back by index, and attention holds all scores. It is as fast as
those steps allow here: products write straight into their place in one result, and nothing is transposed between
layouts.

Shape legend: B batch, N tokens, S slots, E experts, C hidden size, D head dim, R = B N S rows sorted by expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixhead.nn import MixtureOfAttentionHeads


class LoopLinear(torch.autograd.Function):
    """Rows sorted by expert times the weights of their experts [E, in, out], one product an expert."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, expert_size: Tensor, weight: Tensor) -> Tensor:
        sizes = expert_size.tolist()
        ctx.save_for_backward(rows, weight)
        ctx.sizes = sizes
        result = rows.new_empty(rows.shape[0], weight.shape[2])
        for expert, (part, into) in enumerate(zip(rows.split(sizes), result.split(sizes), strict=True)):
            torch.mm(part, weight[expert], out=into)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        rows, weight = ctx.saved_tensors
        drows, dweight = torch.empty_like(rows), torch.empty_like(weight)
        parts = zip(rows.split(ctx.sizes), grad.split(ctx.sizes), drows.split(ctx.sizes), strict=True)
        for expert, (part, dpart, into) in enumerate(parts):
            torch.mm(dpart, weight[expert].t(), out=into)
            torch.mm(part.t(), dpart, out=dweight[expert])
        return drows, None, dweight


class LoopAttention(nn.Module):
    """The published steps on the parameters of a `MixtureOfAttentionHeads` with one key-value head."""

    def __init__(self, layer: MixtureOfAttentionHeads) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """The output [B, N, C] and the weighted sum of the router's losses."""
        layer = self.layer
        batch, tokens, size = x_BNC.shape
        slots, head_dim = layer.top_k, layer.head_dim
        x = x_BNC.reshape(-1, size)
        logits = layer.router.gate_proj(x)
        probs = logits.softmax(1)
        top_gates, top_experts = probs.topk(slots, 1)
        gates = torch.zeros_like(probs).scatter(1, top_experts, top_gates)
        loss = self.losses(logits, probs, gates)

        top_gates = top_gates.flatten()
        filled = top_gates.nonzero().squeeze(1)
        sorted_experts, order = top_experts.flatten()[filled].sort(0)
        place_R = filled[order]
        row_R = place_R.div(slots, rounding_mode="trunc")
        expert_size = torch.bincount(sorted_experts, minlength=layer.num_experts)

        q_RD = LoopLinear.apply(x[row_R], expert_size, layer.q_experts)
        q = x.new_zeros(len(x) * slots, head_dim).index_add(0, place_R, q_RD).view(batch, tokens, slots, head_dim)
        k_weight, v_weight = layer.kv_proj.weight.chunk(2)
        k, v = F.linear(x_BNC, k_weight), F.linear(x_BNC, v_weight)
        weights = torch.einsum("bise,bje->bsij", q * head_dim**-0.5, k).softmax(-1)
        out = torch.einsum("bsij,bje->bise", weights, v)

        y_RC = LoopLinear.apply(out.reshape(-1, head_dim)[place_R], expert_size, layer.o_experts)
        y_RC = y_RC * top_gates[place_R].unsqueeze(1)
        y = x.new_zeros(len(x), size).index_add(0, row_R, y_RC)
        return y.view(batch, tokens, size), loss

    def losses(self, logits: Tensor, probs: Tensor, gates: Tensor) -> Tensor:
        """The weighted sum of the switch loss and the z loss."""
        weights, experts = self.layer.router.loss_weights, self.layer.num_experts
        load = F.normalize((gates > 0).sum(0).float(), p=1, dim=0)
        switch = experts * (F.normalize(probs.sum(0), p=1, dim=0) * load).sum()
        return weights.switch * switch + weights.z * logits.logsumexp(1).square().mean()
