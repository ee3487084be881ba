"""`convert` and `revert`: a Hugging Face model becomes mixture-of-head, and back."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.jetmoe.modeling_jetmoe import JetMoePreTrainedModel

from mixhead.convert.config import MoHConfig
from mixhead.convert.dit import convert_dit, revert_dit
from mixhead.convert.jetmoe import convert_jetmoe
from mixhead.errors import MixheadError
from mixhead.models.calibrated import CALIBRATED, WARNED, learned_routers
from mixhead.models.hugging_face import (
    AttentionSite,
    MoHModelMixin,
    attach_router,
    attention_of,
    become_converted,
    change_class,
    detach_router,
    find_sites,
    forward_attribute,
    moh_config_class,
)
from mixhead.models.jetmoe import is_in_slots, take_out_of_slots
from mixhead.models.moh_dit import MoHDiT
from mixhead.routing import LayerHeads
from mixhead.store import forget_unpacked

Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model, config: MoHConfig | None = None) -> Model:
    """Turns a Hugging Face model, or a dense DiT, into its mixture-of-head form, in place, and returns it.

    Every attention module that dispatches through the attention interface of transformers gets a router; layers whose
    heads are all active stay as they are, so that `active=1.0` computes the same bits as before. The weights are kept.
    An untrained "linear" router chooses at random: call `mixhead.calibrate` next.

    A JetMoE routes already. It keeps its class, its routers and its logits, and gets the operators of this library,
    with which it compiles into one graph and can checkpoint gradients.

    Args:
        model: any model of transformers; it keeps its identity and the name of its class, and gets a configuration of
            its own. Or a dense `MoHDiT`.
        config: how many heads are active and shared, and which router decides; none for a JetMoE.

    Raises:
        MixheadError: where the architecture cannot be converted, its weights are split among processes, or the
            configuration does not fit it.
    """
    if isinstance(model, nn.Module):
        refuse_sharded(model, "Convert")
    if isinstance(model, JetMoePreTrainedModel):
        convert_jetmoe(model, config)
        return model
    config = MoHConfig() if config is None else config
    if isinstance(model, MoHDiT):
        return convert_dit(model, config)  # type: ignore[return-value]
    if isinstance(model, MoHModelMixin):
        raise MixheadError(f"This {type(model).__name__} is converted already: call mixhead.revert on it first.")
    if not isinstance(model, PreTrainedModel):
        raise MixheadError(
            f"mixhead.convert takes a model of transformers or a MoHDiT, but this is a {type(model).__name__}."
        )
    if model.config.output_attentions:
        raise MixheadError(
            f"{type(model).__name__} is set to return attention weights, and a converted model computes none for the "
            "heads that a token skips: set config.output_attentions to False first."
        )
    forget_unpacked(model)
    forward_attribute(model)  # which refuses where there is another
    sites = find_sites(model)
    layers = config.resolve([site.num_heads for site in sites], [site.num_key_value_heads for site in sites])
    moh = {
        "router": config.router,
        "group_balanced": config.group_balanced,
        "balance_coefficient": config.balance_coefficient,
        "layers": [asdict(layer) for layer in layers],
        "original_attention": attention_of(model.config),
    }
    take_own_configuration(model, moh_config_class(type(model.config)))  # type: ignore[arg-type]
    model.config.moh = moh
    try:
        become_converted(model)
    except Exception:
        revert(model)
        raise
    model.config.moh[CALIBRATED] = not learned_routers(model)
    return model


def refuse_sharded(model: nn.Module, verb: str) -> None:
    """Refuses a model whose weights are split among processes: those of new routers would belong to each process alone.

    Args:
        model: any.
        verb: what is to be done before it is split.
    """
    sharded = any(
        isinstance(parameter, kinds_of_sharded()) or hasattr(parameter, "ds_id") for parameter in model.parameters()
    )
    if sharded or any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise MixheadError(
            f"The weights of this {type(model).__name__} are split among processes (FSDP, DeepSpeed, tensor "
            f"parallelism), and its routers would not be. {verb} it first, then split it."
        )


def kinds_of_sharded() -> tuple[type, ...]:
    """Tensors that are parts of one; none where PyTorch was built without `torch.distributed`."""
    if not torch.distributed.is_available():
        return ()
    from torch.distributed.tensor import DTensor

    return (DTensor,)


def take_own_configuration(model: PreTrainedModel, config_class: type[PreTrainedConfig]) -> None:
    """Copies of the configurations to which a model and its modules refer, its own as one of the given class.

    Others may have been built from the same objects: they keep them as they are.
    """
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                vars(module)[name] = copy.deepcopy(value, copies)
    model.config.__class__ = config_class


def set_layer_heads(model: PreTrainedModel, site: AttentionSite, index: int, heads: LayerHeads) -> None:
    """Gives one layer of a converted model another number of active and shared heads, with a fresh router."""
    detach_router(site.module)
    attach_router(site, heads, model.config.moh)
    model.config.moh["layers"][index] = asdict(heads)


def revert(model: Any) -> Any:
    """Takes the routers off a converted model, in place: the original class, configuration and attention again.

    The weights are those that the model has now: tuning changes them, and so does calibration where it fits output
    projections.
    """
    if is_in_slots(model):
        take_out_of_slots(model)
        return model
    if isinstance(model, MoHDiT):
        return revert_dit(model)
    if not isinstance(model, MoHModelMixin):
        raise MixheadError(f"{type(model).__name__} is no converted model, so there is nothing to revert.")
    model = cast(Any, model)
    for site in find_sites(model):
        detach_router(site.module)
    original_attention = model.config.moh["original_attention"]
    take_own_configuration(model, model.config.base_config_class)
    del model.config.moh
    change_class(model, model.base_model_class)
    vars(model).pop(WARNED, None)
    model.set_attn_implementation(original_attention)
    return model
