"""The function that transformers calls for the attention of a converted model, and the class that feeds its router.

The interface passes queries, keys and values, and a router needs the hidden states that they came from. Keywords reach
the interface in many architectures and not in others, so none is used: for the time of one call the attention module is
a copy of itself (of its attributes, which share all weights) that holds its own input as `moh_input`, and hands itself
to the interface. What a call of the whole model wants, every layer learns from `running_call`. Nothing is kept between
calls.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from mixhead.errors import MixheadError
from mixhead.models.hugging_face.call import Call, running_call
from mixhead.models.hugging_face.configuration import new_instance
from mixhead.models.hugging_face.decoding import decode_token
from mixhead.models.hugging_face.router_input import RouterInput, query_argument
from mixhead.ops import head_attention
from mixhead.ops.skipped import fill_skipped
from mixhead.routing import Routing

# Two names for one function, since the name decides which masks a model makes: a model that ran "eager" keeps its own
# masks, so that its dense layers compute the same bits as before.
ATTENTION = "mixhead"
ATTENTION_OF_EAGER = "mixhead_eager"
# What some models hand to the interface, and what changes the mathematics in a way that only their own function knows.
UNSUPPORTED = frozenset({"softcap", "position_bias", "s_aux", "sinks", "cache", "indices", "block_indices"})
# What the call of a converted model takes for itself; a part of it, called alone, would hand it down to here.
OF_THE_CALL = frozenset({"routing_trace", "head_attention_impl", "stand_in"})
LOOKED_AT = UNSUPPORTED | OF_THE_CALL


# Floating masks add at least this much to the scores that they allow: transformers forbids with the smallest number.
MASKED_SCORE = -1e4


def attention_for(original: str | None) -> str:
    """The name under which a model that ran `original` runs here."""
    return ATTENTION_OF_EAGER if original == "eager" else ATTENTION


def attention_of(config: PreTrainedConfig) -> str | dict[str, str]:
    """The attention implementation of a model; where its parts differ, by part, as `set_attn_implementation` has it."""
    whole = config._attn_implementation or "sdpa"
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    names = {key: part._attn_implementation or whole for key, part in parts.items() if part is not None}
    return whole if set(names.values()) <= {whole} else {"": whole, **names}


def eager_attention_of(module: nn.Module) -> Callable[..., Any] | None:
    """The attention function in the file of the module's own class, what "eager" stands for."""
    return inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")


def dense_attention_of(module: nn.Module) -> Callable[..., Any]:
    """What computes all heads of an attention module: the function that did so before, or SDPA."""
    if not hasattr(module, "moh_name"):
        raise MixheadError(
            f"This {type(module).__name__} has the configuration of a converted model, and was built without routers: "
            "load the model with mixhead.load or from_pretrained, or convert it with mixhead.convert."
        )
    eager = getattr(module, "moh_eager_attention", None)
    runs_eager = getattr(getattr(module, "config", None), "_attn_implementation", None) == ATTENTION_OF_EAGER
    return eager if runs_eager and eager is not None else sdpa_attention_forward


@functools.cache
def routing_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class of an attention module that routes: it holds its input while it runs."""
    input_of = query_argument(base.forward)

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = object.__new__(type(self))
        call.__dict__.update(vars(self), moh_input=RouterInput(input_of(args, kwargs)))
        return base.forward(call, *args, **kwargs)

    def reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return new_instance, (routing_class, base), self.__getstate__()

    members = {"forward": forward, "__reduce_ex__": reduce_ex, "moh_base": base, "__module__": base.__module__}
    return type(f"MoH{base.__name__}", (base,), members)


def hold_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The same as a forward pre-hook, for modules whose `forward` is their own, as offloading replaces it."""
    input_of = query_argument(type(module).forward)
    module.moh_input = RouterInput(input_of(args, kwargs))  # type: ignore[assignment]


def drop_input(module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
    """The end of that, as a forward hook."""
    vars(module).pop("moh_input", None)


def moh_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of the selected heads, under the contract of transformers' attention interface.

    The module routes where it has a `moh_router`, and is dense otherwise. Query [B, H, N, D], key [B, K, T, D], value
    [B, K, T, V]; the mask bool or floating, [B, 1, N, T]; `kwargs` are refused where they change the mathematics.

    Returns:
        ([B, N, H, V], None); where all heads are used, what the model's own function returns.
    """
    router: Any = getattr(module, "moh_router", None)
    call = running_call()
    if router is None and call.stand_in is None:
        dense_attention = dense_attention_of(module)
        kwargs = kwargs if is_causal is None else {**kwargs, "is_causal": is_causal}
        return dense_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if not LOOKED_AT.isdisjoint(kwargs):
        check_call(module, kwargs)
    hidden_BNC = module.moh_input.beside(query, str(module.moh_name))  # type: ignore[union-attr,operator]
    if call.is_plain and query.shape[2] == 1 and attention_mask is None and not dropout:
        skipped_HD: Any = module.moh_skipped
        out_B1HD = decode_token(router, skipped_HD, hidden_BNC, query, key, value, scaling)
        if out_B1HD is not None:
            return out_B1HD, None
    token_mask_BN = tokens_that_route_BN(module, call, attention_mask, query, key)
    inputs = (module, query, key, value, attention_mask)
    if call.stand_in is not None:
        seen = call.stand_in(*inputs, scaling, is_causal, hidden_BNC, token_mask_BN)
        if seen is not None:
            return seen
        if router is None:
            return sdpa_attention_forward(*inputs, dropout, scaling, is_causal)
    routing = router(hidden_BNC, query, token_mask_BN)
    if call.trace is not None:
        call.trace.record(str(module.moh_name), routing)
    if dropout > 0.0:
        dense_BNHD, _ = sdpa_attention_forward(*inputs, dropout, scaling, is_causal, **kwargs)
        return with_constants(times_gates(dense_BNHD, routing), routing, module), None
    causal = is_causal_here(module, query, attention_mask, is_causal)
    out_BHND = selected_heads(query, key, value, routing, causal, scaling, attention_mask, call.impl)
    return with_constants(out_BHND.transpose(1, 2), routing, module), None


def tokens_that_route_BN(
    module: nn.Module, call: Call, attention_mask: Tensor | None, query: Tensor, key: Tensor
) -> Tensor | None:
    """bool [B, N], False at padding, from the mask of the call or of the decoder; None where every token is real."""
    if attention_mask is None:
        decoder_BN = call.decoder_token_mask_BN if getattr(module, "is_decoder", False) else None
        return None if decoder_BN is None else decoder_BN[:, -query.shape[2] :]
    mask_BN = real_tokens_BN(attention_mask, query.shape[2], key.shape[2])
    return None if mask_BN is None else mask_BN.expand(query.shape[0], -1)  # one for all samples is allowed


def selected_heads(
    q_BHND: Tensor,
    k_BKTD: Tensor,
    v_BKTV: Tensor,
    routing: Routing,
    causal: bool,
    scale: float | None,
    attn_mask: Tensor | None,
    impl: str,
) -> Tensor:
    """`head_attention` [B, H, N, V], where values may be of another width than keys (DeepSeek)."""
    queries, width = q_BHND.shape[2], v_BKTV.shape[3]
    if causal and k_BKTD.shape[2] > queries:
        # The first tokens of a static cache, whose other places are still empty.
        k_BKTD, v_BKTV = k_BKTD[:, :, :queries], v_BKTV[:, :, :queries]
    difference = q_BHND.shape[3] - width
    if difference:
        scale = q_BHND.shape[3] ** -0.5 if scale is None else scale
        # Zeros change no score, and what they add to the values is cut off again.
        q_BHND, k_BKTD = (F.pad(states, (0, max(-difference, 0))) for states in (q_BHND, k_BKTD))
        v_BKTV = F.pad(v_BKTV, (0, max(difference, 0)))
    out_BHND = head_attention(
        q_BHND, k_BKTD, v_BKTV, routing, causal=causal, scale=scale, attn_mask=attn_mask, impl=impl
    )
    return out_BHND[..., :width] if difference > 0 else out_BHND


def check_call(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raises where the module asks for what is not computed here, or a part of a model was called for the whole."""
    asked = ", ".join(sorted(OF_THE_CALL & kwargs.keys()))
    if asked:
        raise MixheadError(f"{asked} goes to the call of the converted model itself: a part of it does not take it.")
    given = ", ".join(argument for argument in sorted(UNSUPPORTED) if kwargs.get(argument) is not None)
    if given:
        raise MixheadError(
            f"{module.moh_name} was called with {given}, which mixture-of-head attention does not compute."
        )


def is_causal_here(module: nn.Module, query: Tensor, attention_mask: Tensor | None, is_causal: bool | None) -> bool:
    """Whether later keys are hidden without a mask that says so."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return bool(causal) and query.shape[2] > 1 and attention_mask is None


def times_gates(dense_BNHD: Tensor, routing: Routing) -> Tensor:
    """All heads with their gates: no sparse engine drops attention weights, so the stock kernel does, on all heads."""
    gated_BNHD = dense_BNHD * routing.gates_BNH.to(dense_BNHD.dtype).unsqueeze(-1)
    return torch.where(routing.selected_BNH.unsqueeze(-1), gated_BNHD, 0.0)


def with_constants(gated_BNHD: Tensor, routing: Routing, module: nn.Module) -> Tensor:
    """The heads' outputs, with the constants `moh_skipped` of the module, if any, at heads that a token skips."""
    skipped_HD = getattr(module, "moh_skipped", None)
    if skipped_HD is None:
        return gated_BNHD.contiguous()
    return fill_skipped(gated_BNHD, routing.selected_BNH, skipped_HD)


def real_tokens_BN(attention_mask: Tensor | None, num_queries: int, num_keys: int) -> Tensor | None:
    """bool [B, N], False at padding, read off the attention mask; None where every token is real.

    In self-attention a real token may attend to itself and padding may not. Where there are more keys than queries (a
    cache, cross-attention) a token counts as real when it may attend to anything.
    """
    if attention_mask is None or attention_mask.dim() != 4:
        return None
    allowed_BNT = attention_mask[:, 0] if attention_mask.dtype == torch.bool else attention_mask[:, 0] > MASKED_SCORE
    if num_queries == num_keys and allowed_BNT.shape[1] == num_queries:
        return allowed_BNT.diagonal(dim1=1, dim2=2)
    return allowed_BNT.any(-1).expand(-1, num_queries)


# Whatever builds or unpickles a converted model imports this file. The masks are those that the model had before.
for _name, _mask in ((ATTENTION, sdpa_mask), (ATTENTION_OF_EAGER, eager_mask)):
    AttentionInterface.register(_name, moh_attention_forward)
    AttentionMaskInterface.register(_name, _mask)
