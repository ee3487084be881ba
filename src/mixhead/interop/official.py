"""Models from the official code's configurations and weights: `from_official(kind, config, state_dict)`.

Configurations use the official argument names, state dicts the official parameter names. A kind is one adapter
function; each fills a module of this library and refuses weights that are missing, left over or of another shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixhead.errors import MixheadError
from mixhead.interop.llama import moh_llama
from mixhead.interop.vit import moh_vit
from mixhead.nn import MixtureOfAttentionHeads, MixtureOfHeadAttention
from mixhead.routing import LossWeights

StateDict = Mapping[str, Tensor]


def from_official(kind: str, config: Mapping[str, Any], state_dict: StateDict) -> nn.Module:
    """A module of this library with the weights of the official code.

    Args:
        kind: one of `KINDS`.
        config: sizes under the official argument names.
        state_dict: weights under the official parameter names.

    Raises:
        MixheadError: where the kind is unknown, or configuration and weights do not fit each other.
    """
    if kind not in KINDS:
        raise MixheadError(f"kind={kind!r} is unknown: choose one of {', '.join(sorted(KINDS))}.")
    try:
        return KINDS[kind](config, state_dict)
    except KeyError as missing:
        raise MixheadError(f"The configuration of {kind} lacks {missing}: give every size that it names.") from missing


def moh_dit_attention(config: Mapping[str, Any], state_dict: StateDict) -> MixtureOfHeadAttention:
    """One MoH attention layer of the official DiT: `qkv` is laid out (3, heads, head_dim)."""
    attention = MixtureOfHeadAttention(
        config["dim"],
        config["num_heads"],
        config["shared_heads"],
        config["top_k"],
        head_dim=config["head_dim"],
        bias="qkv.bias" in state_dict,
    )
    load_exactly(attention, rename_dit_attention(state_dict))
    return attention


DIT_ROUTER_NAMES = {
    "wg.weight": "router.routed_proj.weight",
    "wg_0.weight": "router.stage_proj.weight",
    "wg_1.weight": "router.shared_proj.weight",
}


def rename_dit_attention(state_dict: StateDict) -> dict[str, Tensor]:
    """Official names of a DiT attention layer to those of `MixtureOfHeadAttention`."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name.startswith("qkv."):
            suffix = name.removeprefix("qkv.")
            for projection, part in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                renamed[f"{projection}.{suffix}"] = part
        elif name.startswith("proj."):
            renamed["o_" + name] = tensor
        else:
            renamed[DIT_ROUTER_NAMES.get(name, name)] = tensor
    return renamed


MOA_NAMES = {
    "q_proj.w_gate": "router.gate_proj.weight",
    "q_proj.w_noise": "router.noise_proj.weight",
    "q_proj.experts.w": "q_experts",
    "q_proj.output_experts.w": "o_experts",
}


def moa_attention(config: Mapping[str, Any], state_dict: StateDict) -> MixtureOfAttentionHeads:
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


def rename_moa_attention(state_dict: StateDict) -> dict[str, Tensor]:
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


def load_exactly(module: nn.Module, state_dict: StateDict) -> None:
    """Loads weights in the dtype they have; every one must be there, none left over, all of the right shape."""
    expected = module.state_dict()
    missing = sorted(expected.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - expected.keys())
    if missing or unexpected:
        raise MixheadError(
            f"The weights do not fit the configuration: missing {missing or 'none'}, unexpected {unexpected or 'none'}."
        )
    for name, tensor in state_dict.items():
        if tensor.shape != expected[name].shape:
            raise MixheadError(
                f"The weight {name} must be {list(expected[name].shape)}, but it is {list(tensor.shape)}."
            )
    dtypes = {tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        module.to(dtypes.pop())
    module.load_state_dict(dict(state_dict))


KINDS: dict[str, Callable[[Mapping[str, Any], StateDict], nn.Module]] = {
    "moa_attention": moa_attention,
    "moh_dit_attention": moh_dit_attention,
    "moh_llama": moh_llama,
    "moh_vit": moh_vit,
}
