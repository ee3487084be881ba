"""How sure means and shares are: bands of 95%, and the t distribution that they need."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

MOST_ALIKE = 0.5  # correlation of neighbours that is believed; fewer than some dozen values say little of it
MOST_FREEDOM = 1000  # beyond, the tails are those of the normal distribution in all digits that anybody reads


def t_tails(t_X: Floats, freedom_X: Floats) -> Floats:
    """Probability of a value at least so far from 0, on either side.

    By the finite sums for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4); broken ones are rounded
    down, which never makes a p-value smaller.

    Args:
        t_X: at least 0.
        freedom_X: degrees of freedom, at least 1; NaN gives NaN.
    """
    return np.array([t_tail(t, freedom) for t, freedom in zip(t_X.tolist(), freedom_X.tolist(), strict=True)])


def t_tail(t: float, freedom: float) -> float:
    """`t_tails` of one value."""
    if math.isnan(t) or math.isnan(freedom):
        return math.nan
    whole = int(min(max(freedom, 1), MOST_FREEDOM))
    angle = math.atan(t / math.sqrt(whole))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = whole % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(1 + odd, whole, 2):
        total += term
        term *= square * k / (k + 1)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1.0 - inside)


@functools.cache
def t_quantile(freedom: int, outside: float = 0.05) -> float:
    """The distance from 0 beyond which, on both sides together, a share of `outside` lies."""
    low, high = 0.0, 1.0
    while t_tail(high, freedom) > outside:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > outside else (low, middle)
    return high


def share_band(share_H: Floats, worth_H: Floats, freedom: int) -> Floats:
    """Wilson's interval of a share, [H, 2]: the values of which the measured one is not among the 5% farthest.

    Args:
        share_H: measured shares, 0 to 1.
        worth_H: of how many independent observations each is worth.
        freedom: degrees of freedom of what is known of their variance.
    """
    square = t_quantile(freedom) ** 2
    middle_H = (share_H + square / (2 * worth_H)) / (1 + square / worth_H)
    spread_H = np.sqrt(square * (share_H * (1 - share_H) / worth_H + square / (4 * worth_H**2)))
    spread_H = spread_H / (1 + square / worth_H)
    return np.stack([middle_H - spread_H, middle_H + spread_H], -1).clip(0, 1)


def inflation(residual_XH: Floats) -> Floats:
    """How much larger the variance of a mean is because neighbours are alike, [H]; 1 where they are not.

    That of a process whose correlation falls by the same factor from neighbour to neighbour.

    Args:
        residual_XH: distances from the mean, in their order.
    """
    square_H = (residual_XH**2).sum(0)
    product_H = (residual_XH[1:] * residual_XH[:-1]).sum(0)
    alike_H = np.divide(product_H, square_H, out=np.zeros_like(square_H), where=square_H > 0).clip(0, MOST_ALIKE)
    return (1 + alike_H) / (1 - alike_H)


def error_of_mean(values_X: Floats) -> float:
    """Standard error of the mean of values in their order; NaN of a single one."""
    if len(values_X) < 2:
        return math.nan
    residual_X1 = (values_X - values_X.mean())[:, None]
    return float(values_X.std(ddof=1) * math.sqrt(inflation(residual_X1)[0] / len(values_X)))


def mean_band(values_X: Floats) -> tuple[float, float]:
    """Between what values the true mean lies with 95% confidence; NaN for a single value."""
    if len(values_X) < 2:
        return math.nan, math.nan
    spread = t_quantile(len(values_X) - 1) * error_of_mean(values_X)
    return float(values_X.mean()) - spread, float(values_X.mean()) + spread
