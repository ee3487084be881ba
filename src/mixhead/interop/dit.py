"""MoH-DiT and dense DiT under the official names: attention layers, whole models, the published checkpoints.

The official code fuses queries, keys and values into one matrix, laid out (3, heads, head_dim).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mixhead.interop.weights import check_fit, load_exactly
from mixhead.models.moh_dit import MoHDiT, MoHDiTConfig
from mixhead.nn import MixtureOfHeadAttention

QKV = ("q_proj", "k_proj", "v_proj")
ROUTER = {"wg": "routed_proj", "wg_0": "stage_proj", "wg_1": "shared_proj"}
# Official name of everything outside attention -> ours.
OUTSIDE = {
    "pos_embed": "pos_embed",
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "time_embed.fc1",
    "t_embedder.mlp.2": "time_embed.fc2",
    "y_embedder.embedding_table": "class_embed",
    "final_layer.adaLN_modulation.1": "final.modulation",
    "final_layer.linear": "final.proj",
}
IN_BLOCK = {"adaLN_modulation.1": "modulation", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")


def moh_dit_attention(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> MixtureOfHeadAttention:
    """One MoH attention layer of the official DiT."""
    attention = MixtureOfHeadAttention(
        config["dim"],
        config["num_heads"],
        config["shared_heads"],
        config["top_k"],
        head_dim=config["head_dim"],
        bias="qkv.bias" in state_dict,
    )
    load_exactly(attention, rename_attention(state_dict, router="router"))
    return attention


def moh_dit(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> MoHDiT:
    """A whole MoH-DiT or dense DiT of the official code, in evaluation mode.

    Args:
        config: sizes under the official argument names; numbers per layer may be lists or one number for all.
        state_dict: weights under the official parameter names; copied. Their dtype becomes the model's.

    Raises:
        MixheadError: where configuration and weights do not fit each other.
    """
    with torch.device("meta"):
        model = MoHDiT(official_config(config, state_dict))
    weights = rename_model(state_dict)
    check_fit(model, weights)
    model.load_state_dict({name: tensor.detach().clone() for name, tensor in weights.items()}, assign=True)
    return model.eval()


def official_config(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> MoHDiTConfig:
    """Our configuration from the official argument names."""
    routed = bool(config.get("moh", "routed_head" in config))
    return MoHDiTConfig(
        sample_size=config["input_size"],
        patch_size=config["patch_size"],
        in_channels=config["in_channels"],
        hidden_size=config["hidden_size"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        head_dim=config.get("head_dim"),
        shared_heads=config["shared_head"] if routed else None,
        top_k=config["routed_head"] if routed else None,
        mlp_ratio=config.get("mlp_ratio", 4.0),
        num_classes=config["num_classes"],
        null_class=config.get("class_dropout_prob", 0.1) > 0,
        learn_sigma=config.get("learn_sigma", True),
        qkv_bias=any(name.endswith("attn.qkv.bias") for name in state_dict),
    )


def rename_model(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names of a whole model to ours; a name that no rule knows stays as it is."""
    renamed: dict[str, Tensor] = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        block = BLOCK.fullmatch(name)
        if block is None:
            renamed[swap_stem(name, OUTSIDE)] = tensor
        elif block[2].startswith("attn."):
            attention.setdefault(block[1], {})[block[2].removeprefix("attn.")] = tensor
        else:
            renamed[block[1] + swap_stem(block[2], IN_BLOCK)] = tensor
    for block_name, weights in attention.items():
        for name, tensor in rename_attention(weights, router="moh_router").items():
            renamed[f"{block_name}attention.{name}"] = tensor
    return renamed


def rename_attention(state_dict: Mapping[str, Tensor], router: str) -> dict[str, Tensor]:
    """Official names of an attention layer to ours, `router` being the attribute that holds the router."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        stem, _, suffix = name.rpartition(".")
        if stem == "qkv":
            for projection, part in zip(QKV, tensor.chunk(3), strict=True):
                renamed[f"{projection}.{suffix}"] = part
        elif stem == "proj":
            renamed[f"o_proj.{suffix}"] = tensor
        else:
            renamed[f"{router}.{ROUTER[stem]}.{suffix}" if stem in ROUTER else name] = tensor
    return renamed


def swap_stem(name: str, names: Mapping[str, str]) -> str:
    """The name with what comes before `.weight` or `.bias` replaced."""
    if name in names:
        return names[name]
    stem, _, suffix = name.rpartition(".")
    return f"{names[stem]}.{suffix}" if stem in names else name
