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
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mixhead.errors import MixheadError
from mixhead.models.hugging_face.attention import ATTENTION, ATTENTION_OF_EAGER, register_attention
from mixhead.models.hugging_face.balance import balance_term
from mixhead.models.hugging_face.routers import attach_routers, initialise_routing
from mixhead.models.hugging_face.trace import JoinedTrace, RoutingTrace

MODEL_TYPE = "mixhead"
# Every configuration class turns the keys of this field into numbers: one that is none stops, with its own text, any
# loader that ignores the model type.
POISONED_FIELD = "id2label"
POISON = {"This is a mixhead checkpoint: `import mixhead` and load it with an Auto class of transformers.": ""}


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
        found: Any = mapping[base_config_class]  # a class, or several of which the checkpoint names one (DeiT)
        several = found if isinstance(found, (tuple, list)) else (found,)
        # Some architectures borrow the model class, and with it the configuration class, of another one.
        own = tuple(moh_model_class(cls) for cls in several if getattr(cls, "config_class", None) is base_config_class)
        if own:
            auto_class.register(config_class, own if len(own) > 1 else own[0], exist_ok=True)


def register_with_transformers() -> None:
    """Lets `AutoConfig` and the Auto model classes load converted checkpoints; called by `import mixhead`."""
    AutoConfig.register(MODEL_TYPE, MixheadConfig, exist_ok=True)
    register_attention()
