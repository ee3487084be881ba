"""JetMoE with its experts in slots: the same mathematics as the model of transformers, the same parameters.

The classes here take the place of those of transformers in a finished model, module by module: `module.__class__` is
all that changes. Where transformers sorts the tokens and reads the sizes of the experts on the host, the projections
into slots have static shapes.

Shape legend: B batch, N tokens, T keys, C hidden size, E experts, S slots (chosen experts of a token), K key-value
heads, D head dim, X = K D, I hidden size of an expert of the feed-forward layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.jetmoe.modeling_jetmoe import (
    JetMoeAttention,
    JetMoeMoA,
    JetMoeMoE,
    JetMoeParallelExperts,
    JetMoePreTrainedModel,
    JetMoeTopKGating,
)

from mixhead.models.hugging_face.attention import real_tokens_BN
from mixhead.nn.moa import rotate, slot_attention
from mixhead.ops import project_from_slots, project_to_slots
from mixhead.routing import ExpertRouting, LossWeights, Router


class SlotGating(JetMoeTopKGating):
    """The router of JetMoE: which experts, and with which gates; nothing is sorted or counted."""

    def forward(self, hidden_BNC: Tensor) -> tuple[Tensor, Tensor, None, None, Tensor]:
        """(expert_BNS, gates_BNS, None, None, logits [B N, E]): transformers records the fifth as router logits."""
        logits_BNE = self.layer(hidden_BNC).float()
        expert_BNS = logits_BNE.topk(self.top_k).indices
        gates_BNS = logits_BNE.gather(-1, expert_BNS).softmax(-1)
        return expert_BNS, gates_BNS, None, None, logits_BNE.flatten(0, 1)


class ChosenExperts(Router):
    """Tells `record_routing` what the router of JetMoE chose: without parameters, and unknown to the computation."""

    def forward(
        self, expert_BNS: Tensor, gates_BNS: Tensor, logits_BNE: Tensor, token_mask_BN: Tensor | None
    ) -> ExpertRouting:
        """The choice as a value, in which padding chooses nothing."""
        slots = (expert_BNS, gates_BNS, logits_BNE, logits_BNE.softmax(-1))
        return ExpertRouting.from_slots(*slots, LossWeights(), token_mask_BN)


class SlotExperts(JetMoeParallelExperts):
    """The weights of all experts, [E, out, in], times what stands in slots or goes into them."""

    def forward(self, states: Tensor, expert_BNS: Tensor, gates_BNS: Tensor | None = None) -> Tensor:
        """[B, N, in] to slots [B, N, S, out], and slots [B, N, S, in] to their sum [B, N, out] (times the gates)."""
        if states.dim() == 3:
            return project_to_slots(states, self.weight, expert_BNS)
        return project_from_slots(states, self.weight.mT, expert_BNS, gates_BNS)


class SlotHeads(JetMoeMoA):
    """The output projection of the attention experts; the query projection, `input_linear`, is called by itself."""

    def forward(self, out_BNSX: Tensor, expert_BNS: Tensor) -> Tensor:
        """[B, N, S, X] to [B, N, C]."""
        output_BNC: Tensor = self.output_linear(out_BNSX, expert_BNS) + self.bias
        return output_BNC


class SlotAttention(JetMoeAttention):
    """Attention of JetMoE: every expert has K query heads and an output projection, all share K key-value heads."""

    chosen: ChosenExperts

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Tensor]:
        """As in transformers: (output, attention weights, which are never made, router logits)."""
        assert position_embeddings is not None
        expert_BNS, gates_BNS, _, _, logits_RE = self.experts.router(hidden_states)
        by_head = (self.num_key_value_heads, self.head_dim)

        q_BNSX = self.experts.input_linear(hidden_states, expert_BNS)
        k_BNX, v_BNX = self.kv_proj(hidden_states).chunk(2, dim=-1)
        k_BKTD = rotate(k_BNX.unflatten(-1, by_head).transpose(1, 2), *(x.unsqueeze(1) for x in position_embeddings))
        v_BKTD = v_BNX.unflatten(-1, by_head).transpose(1, 2)
        if cache is not None:
            k_BKTD, v_BKTD = cache.update(k_BKTD, v_BKTD, self.layer_idx, kwargs=kwargs)
        mask_BN = real_tokens_BN(attention_mask, hidden_states.shape[1], k_BKTD.shape[2])
        self.chosen(expert_BNS, gates_BNS, logits_RE.unflatten(0, hidden_states.shape[:2]), mask_BN)

        tokens = hidden_states.shape[1]
        causal = attention_mask is None and tokens > 1
        if causal and k_BKTD.shape[2] > tokens:
            # The first tokens of a static cache, whose other places are still empty.
            k_BKTD, v_BKTD = k_BKTD[:, :, :tokens], v_BKTD[:, :, :tokens]
        out_BNSX = slot_attention(
            q_BNSX,
            k_BKTD,
            v_BKTD,
            gates_BNS,
            torch.ones_like(expert_BNS, dtype=torch.bool),
            causal=causal,
            attn_mask=attention_mask,
            scale=self.scaling,
            position_embeddings=position_embeddings,
            dropout=self.attention_dropout if self.training else 0.0,
        )
        return self.experts(out_BNSX, expert_BNS), None, logits_RE


class SlotFeedForward(JetMoeMoE):
    """The feed-forward layer of JetMoE: the sum over the chosen experts of gate * (act(x W_1) * x W_2) W_3."""

    def forward(self, layer_input: Tensor) -> Tensor:
        """[B, N, C] to [B, N, C]."""
        expert_BNS, gates_BNS, *_ = self.router(layer_input)
        gate_BNSI, up_BNSI = self.input_linear(layer_input, expert_BNS).chunk(2, -1)
        inner_BNSI = self.activation(gate_BNSI) * up_BNSI
        output_BNC = self.output_linear(inner_BNSI, expert_BNS, gates_BNS)
        return output_BNC + self.bias


REPLACED: dict[type[nn.Module], type[nn.Module]] = {
    JetMoeTopKGating: SlotGating,
    JetMoeParallelExperts: SlotExperts,
    JetMoeMoA: SlotHeads,
    JetMoeAttention: SlotAttention,
    JetMoeMoE: SlotFeedForward,
}
# What the model can do then, and the model of transformers cannot.
ABILITIES = ("supports_gradient_checkpointing", "_can_compile_fullgraph")


def put_in_slots(model: JetMoePreTrainedModel) -> None:
    """Gives every module of the model its class of this file; the parameters and the model's own class stay."""
    for module in [*model.modules()]:
        replace(module)
        if isinstance(module, JetMoePreTrainedModel):
            for ability in ABILITIES:
                setattr(module, ability, True)


def replace(module: nn.Module) -> None:
    """Gives one module its class of this file, if it has one."""
    if type(module) in REPLACED:
        module.__class__ = REPLACED[type(module)]
    if isinstance(module, SlotAttention):
        module.chosen = ChosenExperts()


def take_out_of_slots(model: JetMoePreTrainedModel) -> None:
    """Takes back what `put_in_slots` did."""
    originals = {ours: original for original, ours in REPLACED.items()}
    for module in [*model.modules()]:
        if isinstance(module, SlotAttention):
            del module.chosen
        if type(module) in originals:
            module.__class__ = originals[type(module)]
        if isinstance(module, JetMoePreTrainedModel):
            for ability in ABILITIES:
                delattr(module, ability)


def is_in_slots(model: nn.Module) -> bool:
    """Whether the model is a JetMoE whose experts stand in slots."""
    return isinstance(model, JetMoePreTrainedModel) and any(isinstance(m, SlotAttention) for m in model.modules())
