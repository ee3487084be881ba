"""Routing is a value: which heads each token uses, who decides it, and the losses that keep it balanced."""

from mixhead.routing.losses import balance_loss
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
    "BinaryRouter",
    "LinearRouter",
    "OneStageRouter",
    "QueryNormRouter",
    "Routing",
    "TwoStageRouter",
    "balance_loss",
    "grouped_top_k_mask",
    "mean_balance_loss",
    "soft_selection",
    "top_k_mask",
]
