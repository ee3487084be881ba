"""Routing is a value: which heads each token uses, who decides it, and the losses that keep it balanced."""

from mixhead.routing.experts import ExpertRouter, ExpertRouting, LossWeights
from mixhead.routing.heads import LayerHeads
from mixhead.routing.kinds import ROUTERS, RouterKind, router_kind
from mixhead.routing.losses import balance_loss, cv_loss, switch_loss, z_loss
from mixhead.routing.router import Router
from mixhead.routing.routers import (
    BinaryRouter,
    LinearRouter,
    OneStageRouter,
    QueryNormRouter,
    TwoStageRouter,
    soft_selection,
)
from mixhead.routing.selection import grouped_top_k_mask, top_k_mask
from mixhead.routing.value import Routing, mean_balance_loss

__all__ = [
    "ROUTERS",
    "BinaryRouter",
    "ExpertRouter",
    "ExpertRouting",
    "LayerHeads",
    "LinearRouter",
    "LossWeights",
    "OneStageRouter",
    "QueryNormRouter",
    "Router",
    "RouterKind",
    "Routing",
    "TwoStageRouter",
    "balance_loss",
    "cv_loss",
    "grouped_top_k_mask",
    "mean_balance_loss",
    "router_kind",
    "soft_selection",
    "switch_loss",
    "top_k_mask",
    "z_loss",
]
