"""Finding the attention modules of a Hugging Face model, and what has to be known of each.

Shape legend: H heads, D head dim of the values, C hidden size, Y = H * D.
"""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mixhead.errors import MixheadError
from mixhead.plain import is_plain, place_of

# What attention modules of transformers call the layer that queries come from, and the one that heads go into.
QUERY_PROJECTIONS = (
    "q_proj", "query", "q_a_proj", "q_content_proj", "qkv", "qkv_proj", "Wqkv", "query_key_value", "c_attn", "q", "Wq",
    "q_lin", "to_q", "linear_q",
)  # fmt: skip
OUTPUT_PROJECTIONS = (
    "o_proj", "out_proj", "c_proj", "dense", "proj", "projection", "projection_layer", "output_projection",
    "linear_out", "out_lin", "Wo", "wo", "output", "to_out", "o",
)  # fmt: skip
# What some modules hand to the attention interface, and what changes the mathematics in a way that only they know.
FOREIGN = {
    "position_bias": "its layers add a position bias to the attention scores, which no implementation here takes",
    "s_aux": "its attention has learned sinks, which change the softmax",
    "sinks": "its attention has learned sinks, which change the softmax",
    "indices": "its attention chooses keys for every query (sparse attention), which no implementation here takes",
    "block_indices": "its attention chooses blocks of keys (sparse attention), which no implementation here takes",
}


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
        device: where it computes, which is not where its weights wait when they are offloaded.
        dtype: what it computes in, which is not what its weights are kept in when they are quantised.
    """

    name: str
    module: nn.Module
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    output_projection: nn.Module
    device: torch.device
    dtype: torch.dtype

    @property
    def head_dim(self) -> int:
        """Width of one head's output."""
        return width_of_input(self.output_projection) // self.num_heads

    def output_weight_HDC(self) -> Tensor:
        """The output projection cut by heads, W_O^i of MoH eq. 3, [H, D, C]."""
        return self.output_weight_YC().unflatten(0, (self.num_heads, -1))

    def output_weight_YC(self) -> Tensor:
        """The output projection as it multiplies the concatenated heads, [H * D, C].

        A view in the weight's dtype where it is the plain weight. What hooks, adapters or quantisation make of it is
        found out by a call.
        """
        if self.has_plain_output:
            weight = self.output_projection.weight
            rows_YC = weight if isinstance(self.output_projection, Conv1D) else weight.T
            assert isinstance(rows_YC, Tensor)
            return rows_YC
        with torch.no_grad():
            unit_YY = torch.eye(self.num_heads * self.head_dim, device=self.device, dtype=self.dtype)
            called_YC: Tensor = self.output_projection(unit_YY) - self.output_projection(torch.zeros_like(unit_YY[:1]))
        return called_YC

    @property
    def has_plain_output(self) -> bool:
        """Whether the output projection is its weight and bias and nothing more, so that they may be read and set."""
        return is_plain(self.output_projection, nn.Linear, Conv1D)


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


def foreign_arguments(module: nn.Module) -> list[str]:
    """Which of `FOREIGN` the module hands to the attention interface."""
    source = forward_source(type(module))  # type: ignore[arg-type]
    return [argument for argument in FOREIGN if re.search(rf"\b{argument}=", source)]


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
    for module in model.modules():
        given = foreign_arguments(module) if dispatches(module) else []
        if given:
            raise MixheadError(f"{name} cannot be converted: {FOREIGN[given[0]]}.")
    if any(hasattr(module, "sinks") for module in model.modules()):
        raise MixheadError(f"{name} cannot be converted: {FOREIGN['sinks']}.")
    caps_scores = any(hasattr(config, "attn_logit_softcapping") for config in configs)
    if getattr(model, "_supports_sdpa", True) is False and not caps_scores:
        raise MixheadError(
            f"{name} cannot be converted: it does not support scaled_dot_product_attention, which every "
            "implementation here starts from."
        )


def make_site(model: PreTrainedModel, name: str, module: nn.Module) -> AttentionSite:
    """Reads the sizes of one attention module, off its layers where they tell them, or off its configuration."""
    config = getattr(module, "config", model.config)
    projection = output_projection(model, name, module)
    rows = width_of_input(projection)
    num_heads = number_of_heads(module, config, rows)
    if rows % num_heads:
        raise MixheadError(
            f"{type(model).__name__} cannot be converted: the output projection of {name} takes {rows} numbers, which "
            f"are not those of {num_heads} heads."
        )
    groups = getattr(module, "num_key_value_groups", None)
    if isinstance(groups, int) and groups > 0:
        num_key_value_heads = num_heads // groups
    else:
        num_key_value_heads = first_int(module, config, ("num_key_value_heads",), default=num_heads)
    hidden_size = width_of_queries(module) or first_int(module, config, ("embed_dim", "hidden_size"))
    device, dtype = place_of(projection, model)
    return AttentionSite(name, module, hidden_size, num_heads, num_key_value_heads, projection, device, dtype)


def number_of_heads(module: nn.Module, config: object, rows: int) -> int:
    """Query heads: as the module says, or else the width of all heads tells, or its configuration."""
    heads = first_int(module, None, ("num_heads", "num_attention_heads", "n_heads", "heads"), default=0)
    width = first_int(module, None, ("v_head_dim", "head_dim", "attention_head_size"), default=0)
    if heads or width:
        return heads or max(rows // width, 1)
    return first_int(module, config, ("num_heads", "num_attention_heads"))


def first_int(module: nn.Module, config: object, names: tuple[str, ...], default: int | None = None) -> int:
    """The first of the names that the module or its configuration has."""
    for owner in (module, config):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > 0:
                return value
    if default is not None:
        return default
    raise MixheadError(f"{type(module).__name__} cannot be converted: it does not tell its {' or '.join(names)}.")


def width_of_queries(module: nn.Module) -> int | None:
    """Width of the hidden states that the module's queries come from, where the layer that makes them is known."""
    for attribute in QUERY_PROJECTIONS:
        layer = getattr(module, attribute, None)
        if isinstance(layer, nn.Module) and sizes_known(layer):
            return width_of_input(layer)
    return None


def output_projection(model: PreTrainedModel, name: str, module: nn.Module) -> nn.Module:
    """The layer after the heads; BERT and its kin keep it in a sibling module, `attention.output.dense`."""
    for attribute in OUTPUT_PROJECTIONS:
        layer = getattr(module, attribute, None)
        # Some are the first of several (a dropout follows).
        layer = layer[0] if isinstance(layer, nn.ModuleList | nn.Sequential) else layer
        if isinstance(layer, nn.Module) and sizes_known(layer):
            return layer
    parent = model.get_submodule(name.rpartition(".")[0])
    sibling = getattr(getattr(parent, "output", None), "dense", None)
    if isinstance(sibling, nn.Module):
        return sibling
    linear = {child for child, layer in module.named_children() if isinstance(layer, nn.Linear)}
    if linear == {"q_proj", "k_proj", "v_proj"}:  # The heads are the output (the pooler of V-JEPA 2).
        identity = nn.Identity()
        identity.in_features = module.v_proj.out_features  # type: ignore[union-attr]
        return identity
    raise MixheadError(f"{type(model).__name__} cannot be converted: {name} has no output projection known here.")


def sizes_known(layer: nn.Module) -> bool:
    """Whether a layer is a linear one, or has one inside (an adapter, a clipped or a flexible layer)."""
    return any(isinstance(part, Conv1D) or hasattr(part, "in_features") for part in layer.modules())


def width_of_input(layer: nn.Module) -> int:
    """Width of what a linear layer takes; of the first inside, where it is wrapped."""
    for part in layer.modules():
        if isinstance(part, Conv1D):
            return int(part.nx)
        if hasattr(part, "in_features"):
            return int(part.in_features)  # type: ignore[arg-type]
    raise MixheadError(f"{type(layer).__name__} does not tell its in_features.")
