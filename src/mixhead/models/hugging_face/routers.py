"""Routers come to the attention modules of a model, and go again.

Shape legend: H heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mixhead.errors import MixheadError
from mixhead.models.hugging_face.attention import (
    attention_for,
    drop_input,
    eager_attention_of,
    hold_input,
    routing_class,
)
from mixhead.models.hugging_face.sites import AttentionSite, find_sites
from mixhead.plain import offloading_hooks
from mixhead.routing import LayerHeads, Router, router_kind


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


def attach_router(site: AttentionSite, heads: LayerHeads, moh: dict[str, Any]) -> None:
    """One attention module becomes one that routes; with all heads active it stays as it is.

    A router that is calibrated comes with `moh_skipped` [H, D]: what stands in for a head's output at tokens that skip
    it. It is a constant (zero until calibration measures the mean), so a skipped head still costs nothing.
    """
    module = site.module
    module.moh_name = site.name  # type: ignore[assignment]
    module.moh_router = None  # type: ignore[assignment]
    module.moh_skipped = None  # type: ignore[assignment]
    module.moh_eager_attention = eager_attention_of(module)  # type: ignore[assignment]
    feed_router(module)
    if heads.is_dense:
        return
    kind = router_kind(moh["router"], moh["group_balanced"])
    num_groups = site.num_key_value_heads if moh["group_balanced"] else 1
    router = kind.make(site.hidden_size, heads.num_heads, heads.shared_heads, heads.top_k, num_groups)
    module.moh_router = router.to(device=site.device, dtype=site.dtype)
    router.train(module.training)
    if kind.calibrated:
        if any(getattr(hook, "offload", False) for hook in offloading_hooks(module)):
            raise MixheadError(
                f"The weights of {site.name} itself are offloaded, and nothing can be put beside them: convert the "
                "model first, and offload it then."
            )
        skipped_HD = torch.zeros(heads.num_heads, site.head_dim, device=site.device, dtype=site.dtype)
        module.moh_skipped = nn.Parameter(skipped_HD)


def feed_router(module: nn.Module) -> None:
    """From now on the module holds its input while it runs."""
    module.moh_hooks = ()  # type: ignore[assignment]
    if "forward" in vars(module):
        before = module.register_forward_pre_hook(hold_input, with_kwargs=True)
        module.moh_hooks = (before, module.register_forward_hook(drop_input, always_call=True))  # type: ignore[assignment]
    else:
        module.__class__ = routing_class(type(module))  # type: ignore[arg-type]


def detach_router(module: nn.Module) -> None:
    """Takes back what `attach_router` did."""
    if not hasattr(module, "moh_hooks"):
        return
    if not module.moh_hooks:
        module.__class__ = module.moh_base  # type: ignore[assignment]
    for hook in module.moh_hooks:  # type: ignore[union-attr]
        hook.remove()
    for attribute in ("moh_name", "moh_router", "moh_skipped", "moh_eager_attention", "moh_hooks"):
        delattr(module, attribute)


@torch.no_grad()
def initialise_routing(module: nn.Module) -> None:
    """Gives a router and the constants of skipped heads their start values, unless a checkpoint gave them theirs."""
    skipped_HD = getattr(module, "moh_skipped", None)
    if skipped_HD is not None and not getattr(skipped_HD, "_is_hf_initialized", False):
        skipped_HD.zero_()
    if not isinstance(module, Router):
        return
    tensors = [*module.parameters(), *module.buffers()]
    if any(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
        return
    module.reset_parameters()
    for child in module.modules():
        child._is_hf_initialized = True  # type: ignore[assignment]
