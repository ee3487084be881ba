"""A dense DiT becomes mixture-of-head, and back; what calibration needs to know of one.

Calibration is over time steps: a head that matters in almost pure noise may not matter near the image, and the router,
which sees hidden states scaled and shifted by the time step, can tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mixhead.convert.config import MoHConfig
from mixhead.errors import MixheadError
from mixhead.models.calibrated import WARNED, learned_routers
from mixhead.models.hugging_face import AttentionSite
from mixhead.models.moh_dit import MoHDiT, MoHDiTConfig
from mixhead.nn import MixtureOfHeadAttention
from mixhead.plain import place_of
from mixhead.routing import LayerHeads, router_kind

TRAINING_STEPS = 1000


def convert_dit(model: MoHDiT, config: MoHConfig) -> MoHDiT:
    """Gives every layer of a dense DiT that shall skip heads a router, in place; see `mixhead.convert`."""
    if model.config.shared_heads is not None:
        raise MixheadError("This DiT is mixture-of-head already: call mixhead.revert on it first.")
    heads = [layer.num_heads for layer in model.config.layers]
    layers = config.resolve(heads, heads)
    model.config = with_layers(replace(model.config, router=config.router), layers)
    for index, routes in enumerate(model.config.routes):
        if routes:
            attach_dit_router(model, index)
    model.config = replace(model.config, calibrated=not learned_routers(model))
    return model


def revert_dit(model: MoHDiT) -> MoHDiT:
    """The dense DiT again, in place."""
    if model.config.shared_heads is None:
        raise MixheadError("This DiT is dense, so there is nothing to revert.")
    for _, attention in model.named_attention():
        attention.remove_router()
    vars(model).pop(WARNED, None)
    model.config = replace(model.config, shared_heads=None, top_k=None, router="two_stage", calibrated=True)
    return model


def dit_sites(model: MoHDiT) -> list[AttentionSite]:
    """The attention modules of a DiT."""
    return [
        AttentionSite(
            name,
            module,
            model.config.hidden_size,
            module.num_heads,
            module.num_heads,
            module.o_proj,
            *place_of(module.o_proj, model),
        )
        for name, module in model.named_attention()
    ]


def set_dit_layer_heads(model: MoHDiT, index: int, heads: LayerHeads) -> None:
    """Gives one layer of a converted DiT another number of heads, with a fresh router."""
    layers = list(model.config.layers)
    layers[index] = heads
    model.config = with_layers(model.config, layers)
    attention_of(model, index).remove_router()
    if not heads.is_dense:
        attach_dit_router(model, index)


def attach_dit_router(model: MoHDiT, index: int) -> None:
    """A fresh router for a layer, as the configuration says; where its gates are 0 / 1, constants for skipped heads."""
    heads, attention = model.config.layers[index], attention_of(model, index)
    attention.set_router(model.config.router, heads.shared_heads, heads.top_k)
    if router_kind(model.config.router).weighted:
        attention.router.reset_parameters()
    else:
        attention.reset_skipped()


def attention_of(model: MoHDiT, index: int) -> MixtureOfHeadAttention:
    """The attention of a layer."""
    return [attention for _, attention in model.named_attention()][index]


def with_layers(config: MoHDiTConfig, layers: Sequence[LayerHeads]) -> MoHDiTConfig:
    """The configuration with other numbers of shared and of chosen heads."""
    return replace(
        config,
        shared_heads=tuple(layer.shared_heads for layer in layers),
        top_k=tuple(layer.top_k for layer in layers),
    )


def noised_batches(
    samples: Tensor, classes: Tensor, num_classes: int, *, batch_size: int = 8, null_share: float = 0.1, seed: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Batches for `mixhead.calibrate`: each sample noised to a random time step of the published, linear schedule.

    Args:
        samples: images in [-1, 1] or scaled latents, [B, channels, Y, X].
        classes: their class numbers, [B].
        num_classes: the null class, which takes the place of some classes, as guidance uses it.
        batch_size: samples of a batch.
        null_share: share of the samples that lose their class; 0 for a model without a null class.
        seed: of the noise, the time steps and the null classes.
    """
    if samples.dim() != 4 or classes.shape != samples.shape[:1] or not len(samples):
        raise MixheadError(
            "Calibration needs samples [B, channels, Y, X] and a class number for each, got "
            f"{list(samples.shape)} and {list(classes.shape)}."
        )
    generator = torch.Generator().manual_seed(seed)
    alphas = torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, TRAINING_STEPS, dtype=torch.float64), 0).to(samples.dtype)
    for x, y in zip(samples.split(batch_size), classes.split(batch_size), strict=True):
        t = torch.randint(TRAINING_STEPS, (len(x),), generator=generator)
        alpha = alphas[t].view(-1, 1, 1, 1)
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        null = torch.rand(len(y), generator=generator) < null_share
        yield {"x": alpha.sqrt() * x + (1.0 - alpha).sqrt() * noise, "t": t, "y": y.masked_fill(null, num_classes)}
