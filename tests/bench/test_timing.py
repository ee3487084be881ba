"""Taking turns, and the medians that come of it."""

import time

import pytest
import torch

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


def test_all_take_their_turn_and_short_calls_are_repeated_equally_often():
    order = []
    race([lambda: order.append("a"), lambda: order.append("b")], rounds=2, seconds=1e-4)
    counts = [order.count(name) for name in "ab"]
    # Warm-up once each; the baseline once more, to learn how long it takes.
    assert counts[0] == counts[1] + 1 > 4
    repeats = (counts[1] - 1) // 2
    assert order[3:] == (["a"] * repeats + ["b"] * repeats) * 2


def test_the_number_of_threads_is_put_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), threads(1):
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
