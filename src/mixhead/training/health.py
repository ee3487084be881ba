"""How evenly the heads that compete are used, as numbers for the log of a training run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mixhead.recording.listen import routers_by_layer
from mixhead.recording.names import short_names
from mixhead.routing import Routing
from mixhead.routing.losses import masked_token_mean

HEALTH = ("balance", "smallest_load", "largest_load", "load_entropy")


def layer_columns(model: nn.Module) -> tuple[str, ...]:
    """Names of what `routing_health` measures of each layer that routes, with the numbers that a report gives them."""
    return tuple(f"{HEALTH[-1]}_{layer}" for layer in short_names([*routers_by_layer(model)]))


def routing_health(routings: Sequence[Routing], columns: Sequence[str]) -> dict[str, Tensor]:
    """How evenly the competing heads are used, 0-d tensors by name; empty where nothing competes.

    Means over the layers where heads compete: the balance loss; the smallest and the largest load (shares of the tokens
    that use a head); the entropy of the loads relative to that of even ones (1 = perfectly balanced). That entropy also
    for every layer.

    Args:
        routings: of the layers that route, in their order.
        columns: `layer_columns` of the model.
    """
    layers = {number: layer_health(routing) for number, routing in enumerate(routings) if routing.probs_BNH is not None}
    if not layers:
        return {}
    means = (torch.stack(values).mean() for values in zip(*layers.values(), strict=True))
    return {**dict(zip(HEALTH, means, strict=True)), **{columns[number]: of[-1] for number, of in layers.items()}}


def layer_health(routing: Routing) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four measures of one layer."""
    assert routing.probs_BNH is not None
    load_H = routing.load_H.detach()
    competes_H = masked_token_mean(routing.probs_BNH.detach(), routing.token_mask_BN) > 0
    share_H = load_H * competes_H
    share_H = share_H / share_H.sum().clamp(min=1e-12)
    even = load_H.new_tensor(float(max(routing.num_routed_heads, 2))).log()
    return (
        routing.balance_loss.detach(),
        load_H.masked_fill(~competes_H, 1.0).min(),
        load_H.masked_fill(~competes_H, 0.0).max(),
        -(share_H * share_H.clamp(min=1e-12).log()).sum() / even,
    )
