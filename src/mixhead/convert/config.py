"""`MoHConfig`: what to convert a model to, and how it resolves into whole heads for every layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mixhead.errors import MixheadError
from mixhead.routing import LayerHeads, router_kind

Shares = float | Sequence[float]
Counts = int | Sequence[int]


@dataclass(frozen=True)
class MoHConfig:
    """What `mixhead.convert` makes of a model. Impossible combinations are refused when it is made.

    Attributes:
        active: share of all heads that a token uses, in (0, 1], shared ones included; one number or one per layer.
        shared: share of all heads that every token uses, at most `active`; one number or one per layer. The MoH paper
            trains with about 0.3; a calibrated conversion did not gain from any (benchmarks/results).
        active_heads: `active` as whole heads; replaces it.
        shared_heads: `shared` as whole heads; replaces it.
        router: one of `mixhead.routing.ROUTERS`: "linear" (scores of the hidden states, fitted by `mixhead.calibrate`,
            gates 0 / 1), "query_norm" (the published recipe for LLaMA3, no parameters, gates 0 / 1) or "two_stage"
            (learned, weighted gates; has to be trained).
        group_balanced: equally many active heads in every key-value group ("linear" and "query_norm" only).
        balance_coefficient: weight of the load-balance loss in the training loss. None becomes that of the tables
            (docs/quality.md): 0 for the linear router, whose fitted scores it would pull away from the heads that
            matter; 0.01, as in the MoH paper, for its routers.

    Shares are rounded to the nearest whole head (to the nearest multiple of the key-value heads if `group_balanced`).
    """

    active: Shares = 0.75
    shared: Shares = 0.0
    active_heads: Counts | None = None
    shared_heads: Counts | None = None
    router: str = "linear"
    group_balanced: bool = False
    balance_coefficient: float | None = None

    def __post_init__(self) -> None:
        kind = router_kind(self.router, self.group_balanced)
        if self.balance_coefficient is None:
            object.__setattr__(self, "balance_coefficient", kind.balance)
        elif not 0.0 <= self.balance_coefficient < math.inf:
            raise MixheadError(f"balance_coefficient={self.balance_coefficient} must be 0 or a positive number.")
        for name, low in (("active", 0.0), ("shared", -1.0)):
            shares = as_list(getattr(self, name))
            if not shares:
                raise MixheadError(f"{name} must be a number between 0 and 1, or a list of them, one per layer.")
            for share in shares:
                if isinstance(share, str) or not low < share <= 1.0 or (name == "shared" and share < 0.0):
                    raise MixheadError(f"{name}={share} is no share of heads: it must lie between 0 and 1.")
        for name, least in (("active_heads", 1), ("shared_heads", 0)):
            for count in as_list(getattr(self, name)):
                if isinstance(count, bool) or not isinstance(count, int) or count < least:
                    raise MixheadError(f"{name}={count} must be a whole number of at least {least}.")
        self._check_order("active", "shared", None, None)
        self._check_order("active_heads", "shared_heads", "active_heads", "shared_heads")

    def _check_order(self, active_name: str, shared_name: str, *given: str | None) -> None:
        """More shared than active heads can never be; what mixes shares and counts is checked per layer."""
        if any(name is not None and getattr(self, name) is None for name in given):
            return
        if given[0] is None and (self.active_heads is not None or self.shared_heads is not None):
            return
        active, shared = as_list(getattr(self, active_name)), as_list(getattr(self, shared_name))
        length = max(len(active), len(shared))
        if len(active) not in (1, length) or len(shared) not in (1, length):
            raise MixheadError(
                f"{active_name} has {len(active)} and {shared_name} {len(shared)} entries: give one number, "
                "or one per layer for both."
            )
        for a, s in zip(active * (length // len(active)), shared * (length // len(shared)), strict=True):
            if s > a:
                raise MixheadError(
                    f"{shared_name}={s} exceeds {active_name}={a}: shared heads count as active, "
                    "so there cannot be more of them."
                )

    def resolve(self, num_heads: Sequence[int], num_key_value_heads: Sequence[int]) -> list[LayerHeads]:
        """Whole heads for every layer.

        Args:
            num_heads: query heads of each attention layer, in order.
            num_key_value_heads: key-value heads of each.

        Raises:
            MixheadError: where a layer cannot have such a number of heads.
        """
        layers = len(num_heads)
        groups = list(num_key_value_heads) if self.group_balanced else [1] * layers
        actives = self._counts("active", num_heads, groups)
        shareds = self._counts("shared", num_heads, groups)
        resolved = []
        for layer, (total, active, shared, group) in enumerate(zip(num_heads, actives, shareds, groups, strict=True)):
            if not 1 <= active <= total:
                raise MixheadError(
                    f"Layer {layer} has {total} heads, and {self._said('active', layer)} gives {active} active heads: "
                    f"it must give at least 1 and at most {total}."
                )
            if total == 1 and self._said_share("active", layer) < 1.0:
                raise MixheadError(
                    f"Layer {layer} has a single head, so there is nothing to choose from: "
                    "mixture-of-head attention needs at least 2 heads."
                )
            if shared > active:
                raise MixheadError(
                    f"Layer {layer}: {self._said('shared', layer)} gives {shared} shared heads, but only {active} of "
                    f"{total} heads are active: shared heads count as active, so there cannot be more of them."
                )
            if active % group or shared % group:
                raise MixheadError(
                    f"Layer {layer}: with group_balanced, active_heads={active} and shared_heads={shared} must be "
                    f"multiples of its {group} key-value heads."
                )
            resolved.append(LayerHeads(total, active, shared))
        return resolved

    def _counts(self, kind: str, num_heads: Sequence[int], groups: Sequence[int]) -> list[int]:
        given = getattr(self, f"{kind}_heads")
        if given is not None:
            return per_layer(f"{kind}_heads", given, len(num_heads))
        shares = per_layer(kind, getattr(self, kind), len(num_heads))
        return [
            group * math.floor(share * total / group + 0.5)
            for share, total, group in zip(shares, num_heads, groups, strict=True)
        ]

    def _said(self, kind: str, layer: int) -> str:
        name = kind if getattr(self, f"{kind}_heads") is None else f"{kind}_heads"
        values = as_list(getattr(self, name))
        return f"{name}={values[0] if len(values) == 1 else values[layer]}"

    def _said_share(self, kind: str, layer: int) -> float:
        if getattr(self, f"{kind}_heads") is not None:
            return 1.0
        values = as_list(getattr(self, kind))
        return values[0] if len(values) == 1 else values[layer]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in a checkpoint's configuration."""
        return {
            name: list(v) if isinstance(v, Sequence) and not isinstance(v, str) else v
            for name, v in asdict(self).items()
        }


def as_list(value: Any) -> list[Any]:
    """None -> [], a number -> [number], a sequence -> list."""
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def per_layer(name: str, value: Any, layers: int) -> list[Any]:
    """One value for every layer from one number or a list of the right length."""
    values = as_list(value)
    if len(values) == 1:
        return values * layers
    if len(values) != layers:
        raise MixheadError(f"{name} has {len(values)} entries, but the model has {layers} attention layers.")
    return values
