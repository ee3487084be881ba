"""Classes of converted models and of their configurations, made from any class of transformers.

A converted `LlamaForCausalLM` is a `MoHLlamaForCausalLM`: the same class with routers at its attention modules and the
balance loss in its training loss. Its configuration has the `model_type` "mixhead", and the file keeps the original
configuration one level down beside a poisoned field, so that a loader that does not know mixhead fails loudly instead
of running all heads.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mixhead.errors import MixheadError
from mixhead.models.hugging_face.attention import (
    ATTENTION,
    ATTENTION_OF_EAGER,
    attention_for,
    eager_attention_of,
    hand_down_hidden_states,
    register_attention,
)
from mixhead.models.hugging_face.sites import AttentionSite, find_sites
from mixhead.models.hugging_face.trace import JoinedTrace, RoutingTrace
from mixhead.nn import make_router
from mixhead.routing import BinaryRouter, TwoStageRouter

MODEL_TYPE = "mixhead"
# Every configuration class turns the keys of this field into numbers: one that is none stops, with its own text, any
# loader that ignores the model type.
POISONED_FIELD = "id2label"
POISON = {"This is a mixhead checkpoint: `import mixhead` and load it with an Auto class of transformers.": ""}


@dataclass(frozen=True)
class LayerHeads:
    """How many heads one attention layer has, uses per token, and shares among all tokens."""

    num_heads: int
    active_heads: int
    shared_heads: int

    @property
    def is_dense(self) -> bool:
        """Whether every token uses every head, so that there is nothing to route."""
        return self.active_heads == self.num_heads


class MixheadConfig(PreTrainedConfig):
    """What transformers finds behind the model type "mixhead": it reads the file and hands over to the right class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration of the class that the checkpoint names."""
        base_model_type = config_dict.get("base_model_type")
        if base_model_type not in CONFIG_MAPPING:
            raise MixheadError(
                f"This mixhead checkpoint was made from a model of type {base_model_type!r}, which the installed "
                "transformers does not know: install the version named in its config.json or a later one."
            )
        return moh_config_class(CONFIG_MAPPING[base_model_type]).from_dict(config_dict, **kwargs)


class MoHConfigMixin:
    """What a configuration needs to describe a converted model: `moh`, and its own form in the file."""

    model_type = MODEL_TYPE
    base_config_class: ClassVar[type[PreTrainedConfig]]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads the nested form of the file, and the flat one that `to_dict` gives."""
        if "base_config" in config_dict:
            outer = {k: v for k, v in config_dict.items() if k not in ("base_config", POISONED_FIELD)}
            config_dict = {**config_dict["base_config"], **outer}
        flat = {k: v for k, v in config_dict.items() if k not in ("model_type", "base_model_type")}
        check_description(flat.get("moh"))
        register_models(cls)  # type: ignore[arg-type]
        return super().from_dict(flat, **kwargs)  # type: ignore[misc]

    def to_json_string(self, use_diff: bool = True) -> str:
        """The form of the file; see the head of this module."""
        flat = json.loads(super().to_json_string(use_diff=use_diff))  # type: ignore[misc]
        outer = {key: flat.pop(key) for key in ("architectures", "moh", "transformers_version") if key in flat}
        flat.pop("model_type", None)
        nested = {
            "model_type": MODEL_TYPE,
            "base_model_type": self.base_config_class.model_type,
            "base_config": flat,
            POISONED_FIELD: POISON,
            **outer,
        }
        return json.dumps(nested, indent=2, sort_keys=True) + "\n"


def check_description(moh: Any) -> None:
    """Raises where what stands under `moh` in a configuration does not say how many heads and which router."""
    fields = {"layers", "router", "group_balanced", "balance_coefficient", "original_attention"}
    counts = ("num_heads", "active_heads", "shared_heads")
    known = isinstance(moh, dict) and fields <= {*moh} and isinstance(moh["layers"], list)
    if not known or not all(
        isinstance(layer, dict) and {*layer} == {*counts} and all(type(layer[count]) is int for count in counts)
        for layer in moh["layers"]
    ):
        raise MixheadError(
            "The configuration of this mixhead checkpoint does not say which heads each layer uses (moh): it is "
            "incomplete or was changed by hand."
        )


class MoHModelMixin:
    """What a converted model does beyond its base class."""

    base_model_class: ClassVar[type[PreTrainedModel]]
    config: Any
    training: bool

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        assert isinstance(self, PreTrainedModel)
        attach_routers(self)

    def _init_weights(self, module: nn.Module) -> None:
        initialise_routing(module)
        super()._init_weights(module)  # type: ignore[misc]

    def initialize_weights(self) -> None:
        """Initialises what a checkpoint did not hold; called by transformers after loading."""
        # transformers lets every nested model initialise its own modules, and those models know nothing of routers.
        assert isinstance(self, PreTrainedModel)
        for module in self.modules():
            if not getattr(module, "_is_hf_initialized", False):
                initialise_routing(module)
        super().initialize_weights()  # type: ignore[misc]

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """Refused: under any other attention function all heads would run, and nobody would notice."""
        names = attn_implementation.values() if isinstance(attn_implementation, dict) else [attn_implementation]
        if not {*names} <= {ATTENTION, ATTENTION_OF_EAGER}:
            raise MixheadError(
                f"{type(self).__name__} attends through mixhead: under {attn_implementation!r} every token would use "
                "all heads. Call mixhead.revert on it first."
            )
        super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]


@torch.no_grad()
def initialise_routing(module: nn.Module) -> None:
    """Gives a router and the constants of skipped heads their start values, unless a checkpoint gave them theirs."""
    skipped_HD = getattr(module, "moh_skipped", None)
    if skipped_HD is not None and not getattr(skipped_HD, "_is_hf_initialized", False):
        skipped_HD.zero_()
    if not isinstance(module, BinaryRouter | TwoStageRouter):
        return
    tensors = [*module.parameters(), *module.buffers()]
    if any(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
        return
    module.reset_parameters()
    for child in module.modules():
        child._is_hf_initialized = isinstance(module, TwoStageRouter) or child is module  # type: ignore[assignment]


def forward_with_balance_loss(base_forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a converted model: in training the balance loss joins the loss, exactly once."""

    @functools.wraps(base_forward)
    def forward(self: Any, *args: Any, routing_trace: RoutingTrace | None = None, **kwargs: Any) -> Any:
        if kwargs.get("output_attentions"):
            raise MixheadError(
                f"{type(self).__name__} has no attention weights to return: a token computes none for the heads that "
                "it skips. Call it without output_attentions, or call mixhead.revert on it first."
            )
        if self.config.is_encoder_decoder and takes_keywords:
            kwargs = {**kwargs, "decoder_token_mask_BN": real_decoder_tokens_BN(kwargs)}
        if not self.training:
            passed = {} if routing_trace is None else {"routing_trace": routing_trace}
            return base_forward(self, *args, **passed, **kwargs)
        own = RoutingTrace()
        trace = own if routing_trace is None else JoinedTrace(own, routing_trace)
        outputs = base_forward(self, *args, routing_trace=trace, **kwargs)
        loss = getattr(outputs, "loss", None)
        if loss is not None:
            outputs.loss = loss + balance_term(self, own, kwargs).to(loss)
        return outputs

    signature = inspect.signature(base_forward)
    parameters = list(signature.parameters.values())
    takes_keywords = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    trace_parameter = inspect.Parameter("routing_trace", inspect.Parameter.KEYWORD_ONLY, default=None)
    last = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    # generate() and the Trainer read the signature to learn what the model accepts.
    forward.__signature__ = signature.replace(parameters=[*parameters[:last], trace_parameter, *parameters[last:]])  # type: ignore[attr-defined]
    return forward


def real_decoder_tokens_BN(kwargs: dict[str, Any]) -> Tensor | None:
    """bool [B, N], the decoder's tokens that are no padding, from its mask or else from its labels; None if unknown."""
    mask_BN, labels_BN = kwargs.get("decoder_attention_mask"), kwargs.get("labels")
    if mask_BN is not None:
        return mask_BN.bool() if mask_BN.dim() == 2 else None
    return None if labels_BN is None else labels_BN.ne(-100)


def balance_term(model: Any, trace: RoutingTrace, kwargs: dict[str, Any]) -> Tensor:
    """What the balance loss adds to the loss of this forward call, a 0-d tensor; see `target_share`.

    Args:
        model: the converted model.
        trace: the routings of this call.
        kwargs: the keyword arguments of this call; `labels`, `shift_labels` and `num_items_in_batch` are looked at.
    """
    coefficient = model.config.moh["balance_coefficient"]
    balance = trace.balance_loss()
    if balance is None:
        if not trace.layers and any(router is not None for router in routers(model)):
            raise MixheadError(
                f"No routing reached the loss of {type(model).__name__}: its modules do not pass keyword arguments on "
                "to their attention, so its balance loss cannot be computed."
            )
        return torch.zeros(())
    if coefficient > 0.0 and torch.is_grad_enabled() and not balance.requires_grad and checkpoints_reentrantly(model):
        raise MixheadError(
            "Reentrant gradient checkpointing runs the layers without gradients first, so the balance loss would not "
            'train the routers: enable it with {"use_reentrant": False}, the default of transformers 5, or set the '
            "balance coefficient to 0."
        )
    return coefficient * balance * target_share(model, kwargs)


def target_share(model: Any, kwargs: dict[str, Any]) -> Tensor | float:
    """The share of this forward call in its optimizer step: its number of targets over those of the whole step.

    The `Trainer` hands over `num_items_in_batch`, the number of targets of the whole step, and expects each micro-batch
    to return its share of the step's mean. The balance loss is shared out the same way, or it would count once per
    micro-batch. Without that number (a loop of one's own, or a Trainer that divides afterwards) the share is 1.
    """
    items, targets = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
    labels = kwargs.get("labels")
    if targets is None and labels is not None:
        targets = labels[..., 1:] if shifts_labels(model) else labels
    if items is None or targets is None:
        return 1.0
    share: Tensor = targets.ne(-100).sum() / items
    return share


def shifts_labels(model: Any) -> bool:
    """Whether the loss predicts the next token, so that the first label is never a target; as the `Trainer` decides."""
    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None))
    return loss is ForCausalLMLoss and not getattr(model.config, "is_encoder_decoder", False)


def checkpoints_reentrantly(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on in its reentrant form."""
    functions = (m._gradient_checkpointing_func for m in model.modules() if getattr(m, "gradient_checkpointing", False))
    return any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions)


def routers(model: nn.Module) -> list[nn.Module | None]:
    """The router of every attention module, None where all heads are active."""
    return [m.moh_router for m in model.modules() if hasattr(m, "moh_name") and hasattr(m, "moh_router")]  # type: ignore[misc]


@functools.cache
def moh_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The configuration class of models converted from `base`'s."""
    return type(
        f"MoH{base.__name__}",
        (MoHConfigMixin, base),
        {"base_config_class": base, "model_type": MODEL_TYPE, "__module__": __name__},
    )


@functools.cache
def moh_model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of models converted from `base`."""
    assert base.config_class is not None
    members = {
        "base_model_class": base,
        "config_class": moh_config_class(base.config_class),
        "forward": forward_with_balance_loss(base.forward),
        "__module__": __name__,
    }
    return type(f"MoH{base.__name__}", (MoHModelMixin, base), members)


@functools.cache
def register_models(config_class: type[PreTrainedConfig]) -> None:
    """Makes every Auto class that knows the original configuration know the converted one too."""
    base_config_class = config_class.base_config_class
    auto_classes: list[Any] = [value for value in vars(modeling_auto).values() if inspect.isclass(value)]
    for auto_class in auto_classes:
        mapping = getattr(auto_class, "_model_mapping", None)
        if mapping is None or base_config_class not in mapping:
            continue
        model_class: Any = mapping[base_config_class]
        # Some architectures borrow the model class, and with it the configuration class, of another one.
        if getattr(model_class, "config_class", None) is base_config_class:
            auto_class.register(config_class, moh_model_class(model_class), exist_ok=True)


def register_with_transformers() -> None:
    """Lets `AutoConfig` and the Auto model classes load converted checkpoints; called by `import mixhead`."""
    AutoConfig.register(MODEL_TYPE, MixheadConfig, exist_ok=True)
    register_attention()


def attach_routers(model: PreTrainedModel) -> None:
    """Gives every attention module the router that `config.moh` describes, and turns the model to our attention."""
    moh = model.config.moh
    sites = find_sites(model)
    if len(sites) != len(moh["layers"]):
        raise MixheadError(
            f"The configuration describes {len(moh['layers'])} attention layers, but the model has {len(sites)}."
        )
    for site, layer in zip(sites, moh["layers"], strict=True):
        attach_router(site, LayerHeads(**layer), moh)
    original = moh["original_attention"]
    parts = original.items() if isinstance(original, dict) else [("", original)]
    ours = {key: attention_for(name) for key, name in parts}
    PreTrainedModel.set_attn_implementation(model, ours if isinstance(original, dict) else ours[""])


def attention_of(config: PreTrainedConfig) -> str | dict[str, str]:
    """The attention implementation of a model; where its parts differ, by part, as `set_attn_implementation` has it."""
    whole = config._attn_implementation or "sdpa"
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    names = {key: part._attn_implementation or whole for key, part in parts.items() if part is not None}
    return whole if set(names.values()) <= {whole} else {"": whole, **names}


def attach_router(site: AttentionSite, heads: LayerHeads, moh: dict[str, Any]) -> None:
    """One attention module becomes one that routes; with all heads active it stays as it is.

    A "linear" router comes with `moh_skipped` [H, D]: what stands in for a head's output at tokens that skip it. It is
    a constant (zero until calibration measures the mean), so a skipped head still costs nothing.
    """
    module = site.module
    module.moh_name = site.name  # type: ignore[assignment]
    module.moh_router = None  # type: ignore[assignment]
    module.moh_skipped = None  # type: ignore[assignment]
    module.moh_eager_attention = eager_attention_of(module)  # type: ignore[assignment]
    module.moh_hook = module.register_forward_pre_hook(hand_down_hidden_states, with_kwargs=True)  # type: ignore[assignment]
    if heads.is_dense:
        return
    num_groups = site.num_key_value_heads if moh["group_balanced"] else 1
    top_k = heads.active_heads - heads.shared_heads
    router = make_router(moh["router"], site.hidden_size, heads.num_heads, heads.shared_heads, top_k, num_groups)
    weight = site.output_projection.weight
    module.moh_router = router.to(device=weight.device, dtype=weight.dtype)  # type: ignore[arg-type]
    router.train(module.training)
    if moh["router"] == "linear":
        head_dim = site.output_weight_HDC().shape[1]
        skipped_HD = torch.zeros(heads.num_heads, head_dim, device=weight.device, dtype=weight.dtype)  # type: ignore[arg-type]
        module.moh_skipped = nn.Parameter(skipped_HD)


def detach_router(module: nn.Module) -> None:
    """Takes back what `attach_router` did."""
    if not hasattr(module, "moh_hook"):
        return
    module.moh_hook.remove()  # type: ignore[union-attr,operator]
    for attribute in ("moh_name", "moh_router", "moh_skipped", "moh_eager_attention", "moh_hook"):
        delattr(module, attribute)
