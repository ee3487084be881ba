"""Measuring the cross-over: climbing from small sizes until the kernel has clearly won."""

from dataclasses import replace

import pytest

from mixhead.bench import tune
from mixhead.errors import MixheadError
from mixhead.ops import cpu
from mixhead.ops.crossover import Point

START = Point("float32", False, 1.0, 16, 1, 64, 1, 1, 0.0)


def climb_of(*ratios):
    """A climb over sizes 16, 32, ... and what would be measured there."""
    sizes = [16 << step for step in range(len(ratios))]
    points = tuple(replace(START, queries=n, keys=n) for n in sizes)
    return tune.Climb(points), lambda point: dict(zip(sizes, ratios, strict=True))[point.keys]


def test_a_climb_ends_after_two_clear_wins():
    climb, measure = climb_of(0.5, 1.5, 0.9, 1.3, 1.3, 0.1)
    assert [p.ratio for p in tune.measure_climb(climb, measure)] == [0.5, 1.5, 0.9, 1.3, 1.3]


def test_a_climb_goes_to_its_end_where_the_kernel_never_wins():
    climb, measure = climb_of(0.5, 0.6, 0.7)
    assert [p.keys for p in tune.measure_climb(climb, measure)] == [16, 32, 64]


def test_caches_too_large_for_a_quick_measurement_are_left_out():
    climb = tune.Climb((replace(START, keys=4096, lanes=64, head_dim=128),))
    assert tune.measure_climb(climb, lambda point: 1.0) == []


def test_the_plan_covers_dtypes_masks_shares_decoding_and_groups():
    points = [point for climb in tune.climbs() for point in climb.points]
    for field, wanted in {
        "dtype": {"float32", "bfloat16"},
        "causal": {False, True},
        "share": {0.5, 1.0},
        "lanes": {4, 16, 64},
        "groups": {1, 4},
        "head_dim": {32, 64, 128},
    }.items():
        assert {getattr(p, field) for p in points} == wanted
    assert (1, 4096) in {(p.queries, p.keys) for p in points}
    assert not any(p.causal for p in points if p.queries == 1)  # a single query sees every key either way
    assert len(points) == len(set(points))
    for size in (p.lanes for p in points):
        assert size & (size - 1) == 0


def test_real_points_are_measured_within_the_time_given(monkeypatch):
    if not cpu.available()[0]:
        pytest.skip("there is no C++ compiler")
    steps = []
    assert tune.measure_crossover(lambda done, total: steps.append((done, total)), budget_s=-1.0) == []
    assert steps[0][0] == 0 and steps[-1][0] == steps[-1][1]
    first = next(tune.climbs())
    monkeypatch.setattr(tune, "climbs", lambda: iter([tune.Climb(first.points[:1])]))
    [point] = tune.measure_crossover(lambda done, total: None)
    assert point.ratio > 0 and (point.queries, point.keys) == (16, 16)


def test_without_a_kernel_there_is_nothing_to_measure(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: (False, "no compiler was found"))
    with pytest.raises(MixheadError, match="no compiler was found"):
        tune.measure_crossover(lambda done, total: None)


def test_the_summary_says_from_where_the_kernel_wins():
    climb, measure = climb_of(0.5, 1.5, 0.9, 1.3)
    points = tune.measure_climb(climb, measure)
    assert tune.summary(points) == [("bidirectional, float32, 100% of heads", "from 128 keys (1.30 of dense)")]
    assert tune.first_win(points[:1]) == "never up to 16 keys (0.50 of dense)"
