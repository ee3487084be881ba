"""MoA attention from the official code's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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
    """Official names of a MoA attention module to those of `MixtureOfAttentionHeads`.

    Its routers are an `nn.Linear`, whose weight is transposed, and keys and values come from one projection.
    """
    renamed = dict(state_dict)
    for official, ours in MOA_NAMES.items():
        if official in renamed:
            tensor = renamed.pop(official)
            renamed[ours] = tensor.mT if tensor.dim() == 2 else tensor
    if renamed.keys() >= {"k_proj.weight", "v_proj.weight"}:
        k_XC, v_XC = renamed.pop("k_proj.weight"), renamed.pop("v_proj.weight")
        if k_XC.shape != v_XC.shape:
            raise MixheadError(
                f"k_proj.weight and v_proj.weight must have one shape, got {list(k_XC.shape)} and {list(v_XC.shape)}."
            )
        renamed["kv_proj.weight"] = torch.cat([k_XC, v_XC])
    return renamed
