"""Whether the routers of a converted model were ever fitted: until then they choose at random."""

from __future__ import annotations

import logging
from typing import Any

import torch

from mixhead.routing import Router, router_kind

logger = logging.getLogger(__name__)

CALIBRATED = "calibrated"  # in the configuration; models saved without it are taken to be
WARNED = "moh_warned"


def learned_routers(model: torch.nn.Module) -> list[Router]:
    """The routers of a model that have something to learn."""
    return [
        module for module in model.modules() if isinstance(module, Router) and any(True for _ in module.parameters())
    ]


def trained_or_warned_of(model: torch.nn.Module, router: str) -> bool:
    """Whether a call trains the routers, which then count as fitted; if not, it is said that they choose at random."""
    learns = model.training and torch.is_grad_enabled()
    if learns and any(p.requires_grad for module in learned_routers(model) for p in module.parameters()):
        return True
    warn_of_random_heads(model, router)
    return False


def warn_of_random_heads(model: Any, router: str) -> None:
    """Says once, of a model that was neither calibrated nor trained, that it chooses heads at random.

    Args:
        model: it remembers that it was warned of.
        router: the name of its routers.
    """
    if vars(model).get(WARNED, False):
        return
    vars(model)[WARNED] = True
    logger.warning(
        "This %s was converted and never calibrated nor trained: its %s routers choose heads at random. %s.",
        type(model).__name__,
        router,
        "Call mixhead.calibrate, as `mixhead convert` does, or train it"
        if router_kind(router).calibrated
        else "Train it",
    )
