"""Attention weights of a converted model, for BertViz and CircuitsVis.

A model that skips heads computes no weights for them and returns none. Here they are computed once more, for looking:
the weights of the heads that each token uses, times their gates, and 0 where a token skips a head.

Shape legend: B batch, N queries, T keys, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.models.context import check_ids, check_length
from mixhead.models.hugging_face import MoHModelMixin
from mixhead.models.hugging_face.attention import is_causal_here


class AttentionMaps:
    """Looks at the attention of a call: computes the weights of every module that routes.

    Attributes:
        maps: weights times gates, float32 [B, H, N, T] on the CPU, by the name of the module.
    """

    def __init__(self) -> None:
        self.maps: dict[str, Tensor] = {}

    def __call__(
        self,
        module: Any,
        q_BHND: Tensor,
        k_BKTD: Tensor,
        v_BKTD: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None,
        is_causal: bool | None,
        hidden_BNC: Tensor,
        token_mask_BN: Tensor | None,
    ) -> None:
        """See `StandIn`: it only looks."""
        if module.moh_router is not None:
            routing = module.moh_router(hidden_BNC, q_BHND, token_mask_BN)
            causal = is_causal_here(module, q_BHND, attention_mask, is_causal)
            weights_BHNT = weights_of(q_BHND, k_BKTD, attention_mask, scaling, causal)
            gates_BHN1 = (routing.gates_BNH * routing.selected_BNH).transpose(1, 2).unsqueeze(-1)
            self.maps[module.moh_name] = (weights_BHNT * gates_BHN1).float().cpu()


def weights_of(q_BHND: Tensor, k_BKTD: Tensor, attn_mask: Tensor | None, scale: float | None, causal: bool) -> Tensor:
    """The attention weights of all heads, [B, H, N, T] in float32; 0 where a query may attend to nothing."""
    k_BHTD = k_BKTD.repeat_interleave(q_BHND.shape[1] // k_BKTD.shape[1], dim=1)
    factor = 1.0 / math.sqrt(q_BHND.shape[-1]) if scale is None else scale
    scores_BHNT = (q_BHND.float() @ k_BHTD.float().transpose(-1, -2)) * factor
    if causal:
        later_NT = torch.ones(scores_BHNT.shape[-2:], dtype=torch.bool, device=scores_BHNT.device).triu(1)
        scores_BHNT = scores_BHNT.masked_fill(later_NT, -math.inf)
    if attn_mask is not None:
        allowed = attn_mask.dtype == torch.bool
        scores_BHNT = scores_BHNT.masked_fill(~attn_mask, -math.inf) if allowed else scores_BHNT + attn_mask
    return scores_BHNT.softmax(-1).nan_to_num()


@torch.inference_mode()
def attention_maps(model: torch.nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """The attention weights of a converted model for one call: float32 [B, H, N, T], by module.

    Args:
        model: converted with `mixhead.convert`.
        **inputs: what the model is called with.

    Raises:
        MixheadError: where the model is not converted, or does not know the tokens.
    """
    if not isinstance(model, MoHModelMixin):
        raise MixheadError(f"{type(model).__name__} is not converted: call mixhead.convert on it first.")
    if isinstance(inputs.get("input_ids"), Tensor):
        check_ids(model, inputs["input_ids"])
        check_length(model, inputs["input_ids"].shape[1])
    stand_in = AttentionMaps()
    model(**inputs, stand_in=stand_in, use_cache=False)
    return stand_in.maps


def to_bertviz(maps: Mapping[str, Tensor], tokens: Sequence[str], **options: Any) -> Any:
    """BertViz's head view of the first text of a batch; `options` go to `bertviz.head_view`.

    Args:
        maps: of `attention_maps`, self-attention.
        tokens: what the N tokens say.
        **options: `html_action="return"` returns the page instead of showing it in a notebook.

    Raises:
        MixheadError: where BertViz is not installed, or the tokens are not those of the maps.
    """
    try:
        from bertviz import head_view
    except ImportError:
        raise MixheadError("BertViz is not installed: pip install 'mixhead[attention-views]'.") from None
    check_tokens(maps, tokens)
    return head_view(attention=[weights_BHNT[:1] for weights_BHNT in maps.values()], tokens=[*tokens], **options)


def to_circuitsvis(maps: Mapping[str, Tensor], tokens: Sequence[str], layer: str, **options: Any) -> Any:
    """CircuitsVis's attention heads of one layer, for the first text of a batch; it shows itself in a notebook.

    Args:
        maps: of `attention_maps`, self-attention.
        tokens: what the N tokens say.
        layer: name of the module.
        **options: go to `circuitsvis.attention.attention_heads`.

    Raises:
        MixheadError: where CircuitsVis is not installed, there is no such layer, or the tokens are not those of the
            maps.
    """
    try:
        from circuitsvis.attention import attention_heads
    except ImportError:
        raise MixheadError("CircuitsVis is not installed: pip install 'mixhead[attention-views]'.") from None
    check_tokens(maps, tokens)
    if layer not in maps:
        raise MixheadError(f"No layer {layer!r} routes: choose one of {', '.join(maps)}.")
    weights_HNT = maps[layer][0]
    names = [f"head {head}" for head in range(len(weights_HNT))]
    return attention_heads(weights_HNT, [*tokens], attention_head_names=names, **options)


def check_tokens(maps: Mapping[str, Tensor], tokens: Sequence[str]) -> None:
    """Raises where there are not as many tokens as the maps have queries and keys."""
    for name, weights_BHNT in maps.items():
        if weights_BHNT.shape[-2:] != (len(tokens), len(tokens)):
            queries, keys = weights_BHNT.shape[-2:]
            raise MixheadError(f"{name} maps {queries} tokens to {keys}, but {len(tokens)} tokens were given.")
