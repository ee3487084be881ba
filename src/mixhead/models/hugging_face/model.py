"""Classes of converted models, made from any class of transformers.

A converted `LlamaForCausalLM` is of a class made from it, under its name: what asks by the name of a class (weights
that are renamed at loading, the loss of the Trainer, pipelines) finds what it knows. It has routers at its attention
modules and the balance loss in its training loss.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from mixhead.errors import MixheadError
from mixhead.models.calibrated import CALIBRATED, trained_or_warned_of, warn_of_random_heads
from mixhead.models.hugging_face.attention import ATTENTION, ATTENTION_OF_EAGER
from mixhead.models.hugging_face.balance import balance_term, carried
from mixhead.models.hugging_face.call import Call, StandIn, carrying_calls, running
from mixhead.models.hugging_face.configuration import check_description, moh_config_class, name_of, new_instance
from mixhead.models.hugging_face.loading import refuse_tensor_parallelism
from mixhead.models.hugging_face.routers import attach_routers, initialise_routing
from mixhead.models.hugging_face.trace import RoutingTrace
from mixhead.models.saving import ReadableWeights


class MoHModelMixin(ReadableWeights):
    """What a converted model does beyond its base class."""

    base_model_class: ClassVar[type[PreTrainedModel]]
    config: Any
    training: bool

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        check_description(getattr(config, "moh", None))
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        assert isinstance(self, PreTrainedModel)
        register_models(type(self.config))  # type: ignore[arg-type]
        attach_routers(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickled as its state and what its class is made from, since the class has the name of another."""
        return new_instance, (moh_model_class, self.base_model_class), self.__getstate__()

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, distributed_config: Any, *args: Any) -> nn.Module:
        """Called by transformers where weights are to be distributed while they are loaded."""
        refuse_tensor_parallelism(distributed_config)
        return super().maybe_distribute_model(model, distributed_config, *args)  # type: ignore[misc]

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

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        """Layers that run again in the backward pass run as they did."""
        super()._set_gradient_checkpointing(enable, carrying_calls(gradient_checkpointing_func), **kwargs)  # type: ignore[misc]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused where a larger model that was not converted saves itself: its file would say nothing of the heads."""
        whole = model_that_saves()
        if whole is not None and not isinstance(whole, MoHModelMixin):
            raise MixheadError(
                f"{type(whole).__name__} cannot be saved: a part of it, {type(self).__name__}, was converted alone, "
                "and the configuration of the whole does not say so. Convert the whole model, or save the part."
            )
        return super().state_dict(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; refuses quantised weights, and says where the routers are as random as they were made."""
        quantised = getattr(self.config, "quantization_config", None) is not None
        if quantised or not all(is_stored_as_it_is(weight) for weight in self.parameters()):  # type: ignore[attr-defined]
            raise MixheadError(
                f"The weights of this {type(self).__name__} are quantised, and cannot be saved so: save the model "
                "before that is done, and quantise what is loaded."
            )
        if not self.config.moh.get(CALIBRATED, True):
            warn_of_random_heads(self, self.config.moh["router"])
        return super().save_pretrained(*args, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """Refused: under any other attention function all heads would run, and nobody would notice."""
        names = attn_implementation.values() if isinstance(attn_implementation, dict) else [attn_implementation]
        if not {*names} <= {ATTENTION, ATTENTION_OF_EAGER}:
            raise MixheadError(
                f"{type(self).__name__} attends through mixhead: under {attn_implementation!r} every token would use "
                "all heads. Call mixhead.revert on it first."
            )
        super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]


def is_stored_as_it_is(weight: Tensor) -> bool:
    """Whether a weight is numbers that a file keeps, here or on several devices."""
    return type(weight) in (nn.Parameter, Tensor) or isinstance(weight, DTensor)


def model_that_saves() -> PreTrainedModel | None:
    """The model whose `save_pretrained` is running, if any: nothing else tells a part that its whole is being saved."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "save_pretrained" else None
        if isinstance(owner, PreTrainedModel):
            return owner
        frame = frame.f_back
    return None


def forward_with_balance_loss(base_forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a converted model: in training the balance loss joins the loss, exactly once.

    Where a call computes no loss its outputs carry the balance loss, unless the caller asks for the routings himself.
    """

    @functools.wraps(base_forward)
    def forward(
        self: Any,
        *args: Any,
        routing_trace: RoutingTrace | None = None,
        head_attention_impl: str = "auto",
        stand_in: StandIn | None = None,
        **kwargs: Any,
    ) -> Any:
        if kwargs.get("output_attentions"):
            raise MixheadError(
                f"{type(self).__name__} has no attention weights to return: a token computes none for the heads that "
                "it skips. Call it without output_attentions, or call mixhead.revert on it first."
            )
        mask_BN = real_decoder_tokens_BN(kwargs) if self.config.is_encoder_decoder else None
        if not torch.compiler.is_compiling() and not self.config.moh.get(CALIBRATED, True):
            self.config.moh[CALIBRATED] = trained_or_warned_of(self, self.config.moh["router"])
        if not self.training:
            with running(Call(routing_trace, mask_BN, head_attention_impl, stand_in)):
                return base_forward(self, *args, **kwargs)
        own = RoutingTrace()
        with running(Call(own, mask_BN, head_attention_impl, stand_in)):
            outputs = base_forward(self, *args, **kwargs)
        if routing_trace is not None:
            for name, routing in own.layers:
                routing_trace.record(name, routing)
        loss = getattr(outputs, "loss", None)
        if loss is not None:
            outputs.loss = loss + balance_term(self, own, kwargs).to(loss)
        elif routing_trace is None and self.config.moh["balance_coefficient"] > 0.0 and torch.is_grad_enabled():
            balance = balance_term(self, own, kwargs)
            told = kwargs.get("num_items_in_batch") if kwargs.get("labels") is None else None
            return carried(outputs, balance, told) if balance.requires_grad else outputs
        return outputs

    # generate() and the Trainer read the signature to learn what the model accepts.
    forward.__signature__ = with_keywords(  # type: ignore[attr-defined]
        inspect.signature(base_forward), {"routing_trace": None, "head_attention_impl": "auto", "stand_in": None}
    )
    return forward


def with_keywords(signature: inspect.Signature, defaults: dict[str, Any]) -> inspect.Signature:
    """The signature with keyword-only parameters more."""
    parameters = list(signature.parameters.values())
    last = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default) for name, default in defaults.items()
    ]
    return signature.replace(parameters=[*parameters[:last], *more, *parameters[last:]])


def real_decoder_tokens_BN(kwargs: dict[str, Any]) -> Tensor | None:
    """bool [B, N], the decoder's tokens that are no padding, from its mask or else from its labels; None if unknown."""
    mask_BN, labels_BN = kwargs.get("decoder_attention_mask"), kwargs.get("labels")
    if mask_BN is not None:
        return mask_BN.bool() if mask_BN.dim() == 2 else None
    return None if labels_BN is None else labels_BN.ne(-100)


@functools.cache
def moh_model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of models converted from `base`, under the name of `base`."""
    assert base.config_class is not None
    members = {
        "base_model_class": base,
        "config_class": moh_config_class(base.config_class),
        "forward": forward_with_balance_loss(base.forward),
        **name_of(base),
    }
    return type(base.__name__, (MoHModelMixin, base), members)


def become_converted(model: PreTrainedModel) -> None:
    """Gives a model whose configuration is that of a converted one the class and the routers of one."""
    if isinstance(model, MoHModelMixin):
        return
    register_models(type(model.config))  # type: ignore[arg-type]
    change_class(model, moh_model_class(type(model)))  # type: ignore[arg-type]
    attach_routers(model)
    for module in model.modules():
        if "_gradient_checkpointing_func" in vars(module):  # it was enabled before
            module._gradient_checkpointing_func = carrying_calls(module._gradient_checkpointing_func)


def change_class(model: PreTrainedModel, new: type[PreTrainedModel]) -> None:
    """Gives a model another class, also where accelerate's hooks have put the forward of the old one into the model."""
    name = forward_attribute(model)
    if name is not None:
        vars(model)[name] = types.MethodType(new.forward, model)
    model.__class__ = new


def forward_attribute(model: nn.Module) -> str | None:
    """The attribute that holds the forward of the model's class beside the class itself, where hooks put it.

    Raises:
        MixheadError: where something else was put in its place, which would go on calling the forward of this class.
    """
    own = vars(model)
    if "forward" not in own:
        return None
    for name in ("_old_forward", "forward"):
        if getattr(own.get(name), "__func__", None) is type(model).forward:
            return name
    raise MixheadError(
        f"The forward of this {type(model).__name__} was replaced, as by Accelerator.prepare, and would not know of "
        "its heads: convert the model first, and wrap it then."
    )


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
