"""All routers by name, as configurations and recipes say them. A new one is a class in this room and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mixhead.errors import MixheadError
from mixhead.routing.router import Router
from mixhead.routing.routers import LinearRouter, QueryNormRouter, TwoStageRouter


@dataclass(frozen=True)
class RouterKind:
    """A router that attention layers can be given by name.

    Attributes:
        make: (hidden_size, num_heads, shared_heads, top_k, num_groups) to a router; `num_groups` is 1, or the number of
            key-value heads, each of which then has equally many active heads.
        balance: weight of the load-balance loss in training where nobody gives another.
        weighted: whether gates are weights, which a layer has also where every head is active; else they are 0 or 1.
        groups: whether it can be group-balanced.
        calibrated: whether `mixhead.calibrate` fits it, and measures constants that stand in for skipped heads.
    """

    make: Callable[[int, int, int, int, int], Router]
    balance: float = 0.01  # as in the MoH paper
    weighted: bool = False
    groups: bool = True
    calibrated: bool = False


ROUTERS = {
    "two_stage": RouterKind(lambda c, h, s, k, g: TwoStageRouter(c, h, s, k), weighted=True, groups=False),
    "query_norm": RouterKind(lambda c, h, s, k, g: QueryNormRouter(h, s, s + k, g)),
    # A balance loss would pull its fitted scores away from the heads that matter.
    "linear": RouterKind(lambda c, h, s, k, g: LinearRouter(c, h, s, s + k, g), balance=0.0, calibrated=True),
}


def router_kind(name: str, group_balanced: bool = False) -> RouterKind:
    """The router of that name.

    Raises:
        MixheadError: where there is none, or it cannot be group-balanced and shall be.
    """
    if name not in ROUTERS:
        raise MixheadError(f"router={name!r} is unknown: choose one of {', '.join(ROUTERS)}.")
    if group_balanced and not ROUTERS[name].groups:
        able = " or ".join(repr(other) for other, kind in ROUTERS.items() if kind.groups)
        raise MixheadError(f"router={name!r} cannot be group-balanced: choose {able}.")
    return ROUTERS[name]
