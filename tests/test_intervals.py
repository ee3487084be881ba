"""Student's t, against tables."""

import math

import numpy as np
import pytest

from mixhead.intervals import t_quantile, t_tails


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (9, 2.2622), (18, 2.1009), (120, 1.9799), (1000, 1.9623)]
)
def test_quantiles_as_in_the_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=1e-4)
    assert t_tails(np.array([quantile]), np.array([freedom]))[0] == pytest.approx(0.05, abs=1e-5)


def test_tails():
    tails = t_tails(np.array([0.0, 1.0, 3.922, 9.0, math.nan]), np.array([5.0, 1.0, 18.9, 5000.0, 3.0]))
    assert tails[:2] == pytest.approx([1.0, 0.5])
    assert tails[2] == pytest.approx(0.001, rel=1e-3)  # 18 degrees of freedom
    assert tails[3] < 1e-15
    assert math.isnan(tails[4])
