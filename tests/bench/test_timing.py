"""Taking turns, and the medians that come of it."""

import time

import pytest
import torch

from mixhead.bench import timing
from mixhead.bench.timing import Times, race, ratio, threads


def test_a_slower_call_has_a_ratio_below_one_by_both_clocks():
    def spin(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    fast, slow = race([lambda: spin(0.002), lambda: spin(0.006)], rounds=3, seconds=0.0)
    assert len(fast.wall) == len(slow.cpu) == 3
    assert ratio(fast, slow).cpu == pytest.approx(1 / 3, rel=0.2)
    assert ratio(fast, slow).wall < 0.9
    assert ratio(slow, slow).wall == 1.0


def test_the_ratio_is_the_median_of_the_rounds_not_the_ratio_of_medians():
    baseline, ours = Times((1.0, 2.0, 9.0), (1.0, 1.0, 1.0)), Times((1.0, 1.0, 1.0), (2.0, 4.0, 8.0))
    assert ratio(baseline, ours).wall == 2.0
    assert ratio(baseline, ours).cpu == 0.25
    assert ours.cpu_ms == 4000.0


class Clock:
    """Stands still but for what the calls take."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    process_time = perf_counter


def test_all_take_their_turn_and_short_calls_are_repeated_equally_often(monkeypatch):
    clock, order = Clock(), []
    monkeypatch.setattr(timing, "time", clock)

    def call(name, seconds):
        order.append(name)
        clock.now += seconds

    measured = race([lambda: call("a", 1 / 1024), lambda: call("b", 1 / 256)], rounds=2, seconds=8 / 1024)
    # Once each to warm up; the baseline once more, to learn how long it takes: eight calls are the least time.
    assert order == ["a", "b", "a", *(["a"] * 8 + ["b"] * 8) * 2]
    assert [times.wall for times in measured] == [(1 / 1024, 1 / 1024), (1 / 256, 1 / 256)]


def test_a_long_call_is_not_repeated(monkeypatch):
    clock, order = Clock(), []
    monkeypatch.setattr(timing, "time", clock)

    def call():
        order.append("a")
        clock.now += 1.0

    assert race([call], rounds=2, seconds=0.1)[0].cpu == (1.0, 1.0)
    assert len(order) == 1 + 2


def test_the_number_of_threads_is_put_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), threads(1):
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
