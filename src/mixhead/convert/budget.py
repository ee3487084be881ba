"""Sharing a number of heads out among layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

logger = logging.getLogger(__name__)


def share_out(costs: Sequence[Mapping[int, float]], total: int, dense_layers: int = 0) -> list[int]:
    """Takes heads away where that costs least until `total` are left; from all heads, one step at a time.

    Args:
        costs: for every layer, what each allowed number of heads costs; the largest number is where it begins.
        total: heads that may be left over all layers.
        dense_layers: so many first layers keep all heads, as far as the others can make up for it.

    Returns:
        The number of heads of every layer. They sum to `total`, or to the nearest sum above it that the steps allow.
    """
    dense = most_dense(costs, dense_layers, total)
    costs = [{max(cost): 0.0} if layer < dense else cost for layer, cost in enumerate(costs)]
    steps = [sorted(cost, reverse=True) for cost in costs]
    place = [0] * len(steps)
    left = sum(step[0] for step in steps)

    def price(layer: int) -> float:
        """What one head less costs there."""
        now, then = steps[layer][place[layer]], steps[layer][place[layer] + 1]
        return (costs[layer][then] - costs[layer][now]) / (now - then)

    while True:
        open_layers = [
            layer
            for layer, step in enumerate(steps)
            if place[layer] + 1 < len(step) and left - (step[place[layer]] - step[place[layer] + 1]) >= total
        ]
        if not open_layers:
            return [step[at] for step, at in zip(steps, place, strict=True)]
        cheapest = min(open_layers, key=price)
        left -= steps[cheapest][place[cheapest]] - steps[cheapest][place[cheapest] + 1]
        place[cheapest] += 1


def most_dense(costs: Sequence[Mapping[int, float]], wanted: int, total: int) -> int:
    """How many of the first layers can keep all heads, where the others make up for it with as few as they may have.

    Args:
        costs: as above.
        wanted: how many shall; fewer are told.
        total: as above.
    """
    wanted = min(wanted, len(costs))
    least, most = [min(cost) for cost in costs], [max(cost) for cost in costs]
    kept = next((k for k in range(wanted, 0, -1) if sum(most[:k]) + sum(least[k:]) <= total), 0)
    if kept < wanted:
        logger.info(
            "Only %d of the first %d layers keep all heads: the others would need more than %d heads in all.",
            *(kept, wanted, total),
        )
    return kept
