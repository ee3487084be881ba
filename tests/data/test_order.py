"""The order in which runs read their data."""

from mixhead.data.order import ShuffledRounds


def test_every_number_comes_once_a_round_and_rounds_differ() -> None:
    order = ShuffledRounds(20, first_seed=3)
    first, second = ([order[place] for place in range(start, start + 20)] for start in (0, 20))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_the_place_alone_decides() -> None:
    straight = ShuffledRounds(7, first_seed=0)
    expected = [straight[place] for place in range(30)]
    jumping = ShuffledRounds(7, first_seed=0)
    assert all(jumping[place] == expected[place] for place in (29, 0, 13, 14, 6))
    assert [ShuffledRounds(7, first_seed=1)[place] for place in range(7)] == expected[7:14]
