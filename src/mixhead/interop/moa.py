"""MoA attention from the official code's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.interop.weights import load_exactly
from mixhead.nn import MixtureOfAttentionHeads
from mixhead.routing import LossWeights

MOA_NAMES = {
    "q_proj.w_gate": "router.gate_proj.weight",
    "q_proj.w_noise": "router.noise_proj.weight",
    "q_proj.experts.w": "q_experts",
    "q_proj.output_experts.w": "o_experts",
}


def moa_attention(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> MixtureOfAttentionHeads:
    """One attention module of the official MoA, batch first; `loss_weights` may name the losses switch, z and cv."""
    weights = config.get("loss_weights", {})
    if unknown := sorted({*weights} - {"switch", "z", "cv"}):
        raise MixheadError(f"loss_weights names {', '.join(unknown)}, but the losses are switch, z and cv.")
    attention = MixtureOfAttentionHeads(
        config["embed_dim"],
        config["num_experts"],
        config["top_k"],
        config["head_dim"],
        key_value_size=config.get("kdim", config["embed_dim"]),
        noisy="q_proj.w_noise" in state_dict,
        sample_k=config.get("sample_topk", 0),
        loss_weights=LossWeights(**{"switch": 0.0, "z": 0.0, "cv": 0.0, **weights}),
    )
    load_exactly(attention, rename_moa_attention(state_dict))
    return attention


def rename_moa_attention(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names of a MoA attention module to those of `MixtureOfAttentionHeads`, which has `nn.Linear` routers."""
    renamed = {}
    for name, tensor in state_dict.items():
        transposed = name in ("q_proj.w_gate", "q_proj.w_noise")
        renamed[MOA_NAMES.get(name, name)] = tensor.mT if transposed else tensor
    return renamed
