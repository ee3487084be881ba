"""JetMoE is a mixture of attention heads already: conversion gives it the operators of this library, and no router."""

from __future__ import annotations

from transformers.models.jetmoe.modeling_jetmoe import JetMoePreTrainedModel

from mixhead.convert.config import MoHConfig
from mixhead.errors import MixheadError
from mixhead.models.jetmoe import is_in_slots, put_in_slots

# Those whose masks `head_attention` takes.
ATTENTION = ("sdpa", "eager")


def convert_jetmoe(model: JetMoePreTrainedModel, config: MoHConfig | None) -> None:
    """Puts the experts of a JetMoE into slots, in place: equal logits, the same parameters, an unchanged configuration.

    What is saved is a JetMoE that transformers loads as it is; converting it again costs nothing.

    Raises:
        MixheadError: where it is converted already, or a configuration for routers is given.
    """
    name = type(model).__name__
    if config is not None:
        raise MixheadError(f"{name} has routers of its own that choose its heads: convert it without a MoHConfig.")
    if is_in_slots(model):
        raise MixheadError(f"{name} is converted already: call mixhead.revert on it first.")
    if model.config._attn_implementation not in ATTENTION:
        raise MixheadError(
            f"{name} runs attn_implementation={model.config._attn_implementation!r}, whose masks mixhead does not "
            f"read: call set_attn_implementation with one of {', '.join(ATTENTION)} first."
        )
    if any("forward" in vars(module) for module in model.modules()):
        raise MixheadError(f"{name} is offloaded or wrapped: convert it first, and offload it then.")
    put_in_slots(model)
