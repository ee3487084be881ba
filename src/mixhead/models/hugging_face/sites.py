"""Finding the attention modules of a Hugging Face model, and what has to be known of each."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mixhead.errors import MixheadError

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense")


@dataclass(frozen=True)
class AttentionSite:
    """One attention module that dispatches through the attention interface.

    Attributes:
        name: path of the module inside the model.
        module: the module itself.
        hidden_size: width of the hidden states that it receives.
        num_heads: query heads.
        num_key_value_heads: key-value heads.
        output_projection: the layer that maps the concatenated heads to the hidden size.
    """

    name: str
    module: nn.Module
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    output_projection: nn.Module

    def output_weight_HDC(self) -> Tensor:
        """The output projection cut by heads, W_O^i of MoH eq. 3: a view in the weight's dtype, [H, D, C]."""
        return self.output_weight_YC().unflatten(0, (self.num_heads, -1))

    def output_weight_YC(self) -> Tensor:
        """The output projection as it multiplies the concatenated heads: a view in the weight's dtype, [H * D, C]."""
        weight = self.output_projection.weight
        rows_YC = weight if isinstance(self.output_projection, Conv1D) else weight.T
        assert isinstance(rows_YC, Tensor)
        return rows_YC


def find_sites(model: PreTrainedModel) -> list[AttentionSite]:
    """All attention modules that can be converted, in the order of the model's modules.

    Raises:
        MixheadError: where the architecture cannot be converted; the sentence says why.
    """
    modules = [(name, module) for name, module in model.named_modules() if dispatches(module)]
    if not modules:
        raise MixheadError(
            f"{type(model).__name__} cannot be converted: none of its modules dispatches its attention through the "
            "attention interface of transformers, so its heads cannot be chosen from outside."
        )
    refuse_unsupported(model)
    return [make_site(model, name, module) for name, module in modules]


def dispatches(module: nn.Module) -> bool:
    """Whether the module's own forward calls the attention interface.

    transformers keeps no list of such modules; its convention, which its own checks enforce, is this call.
    """
    return "attention_interface(" in forward_source(type(module))  # type: ignore[arg-type]


def passes_position_bias(module: nn.Module) -> bool:
    """Whether the module hands a bias of its own to the attention interface, as T5 does."""
    return "position_bias=" in forward_source(type(module))  # type: ignore[arg-type]


@functools.cache
def forward_source(module_class: type[nn.Module]) -> str:
    """Source text of the class's forward; empty where there is none."""
    try:
        return inspect.getsource(inspect.unwrap(module_class.forward))
    except (OSError, TypeError):
        return ""


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raises for what the attention function of this library would compute wrongly."""
    name = type(model).__name__
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    if any(getattr(config, "attn_logit_softcapping", None) is not None for config in configs):
        raise MixheadError(
            f"{name} cannot be converted: it caps its attention scores (attn_logit_softcapping), which no fused "
            "attention kernel computes. If its quality does not depend on it, set that field to None first."
        )
    if any(getattr(config, "reorder_and_upcast_attn", False) for config in configs):
        raise MixheadError(f"{name} cannot be converted while its configuration sets reorder_and_upcast_attn.")
    if any(dispatches(module) and passes_position_bias(module) for module in model.modules()):
        raise MixheadError(
            f"{name} cannot be converted: its layers add a position bias to the attention scores, which no "
            "implementation here takes."
        )
    if any(hasattr(module, "sinks") for module in model.modules()):
        raise MixheadError(f"{name} cannot be converted: its attention has learned sinks, which change the softmax.")
    caps_scores = any(hasattr(config, "attn_logit_softcapping") for config in configs)
    if getattr(model, "_supports_sdpa", True) is False and not caps_scores:
        raise MixheadError(
            f"{name} cannot be converted: it does not support scaled_dot_product_attention, which every "
            "implementation here starts from."
        )


def make_site(model: PreTrainedModel, name: str, module: nn.Module) -> AttentionSite:
    """Reads the sizes of one attention module."""
    config = getattr(module, "config", model.config)
    num_heads = first_int(module, config, ("num_heads", "num_attention_heads"))
    num_key_value_heads = first_int(module, config, ("num_key_value_heads",), default=num_heads)
    groups = getattr(module, "num_key_value_groups", None)
    if isinstance(groups, int):
        num_key_value_heads = num_heads // groups
    hidden_size = first_int(module, config, ("embed_dim", "hidden_size"))
    return AttentionSite(
        name, module, hidden_size, num_heads, num_key_value_heads, output_projection(model, name, module)
    )


def first_int(module: nn.Module, config: object, names: tuple[str, ...], default: int | None = None) -> int:
    """The first of the names that the module or its configuration has."""
    for owner in (module, config):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    if default is not None:
        return default
    raise MixheadError(f"{type(module).__name__} cannot be converted: it does not tell its {' or '.join(names)}.")


def output_projection(model: PreTrainedModel, name: str, module: nn.Module) -> nn.Module:
    """The layer after the heads; BERT and its kin keep it in a sibling module, `attention.output.dense`."""
    for attribute in OUTPUT_PROJECTIONS:
        layer = getattr(module, attribute, None)
        if isinstance(getattr(layer, "weight", None), torch.Tensor):
            assert isinstance(layer, nn.Module)
            return layer
    parent = model.get_submodule(name.rpartition(".")[0])
    sibling = getattr(getattr(parent, "output", None), "dense", None)
    if isinstance(sibling, nn.Module):
        return sibling
    raise MixheadError(f"{type(model).__name__} cannot be converted: {name} has no output projection known here.")
