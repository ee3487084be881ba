"""The order in which a run reads its data, given by seed and place alone, so that a resumed run reads the same."""

from __future__ import annotations

import torch

SEED_STRIDE = 1_000_003  # between the seeds of two runs, so that what they draw has no seed in common


class ShuffledRounds:
    """The numbers below `size` in an order without end: a permutation of them, then another.

    Args:
        size: how many numbers a round has.
        first_seed: of the first permutation; those of later rounds follow it.
    """

    def __init__(self, size: int, first_seed: int) -> None:
        self.size, self.first_seed = size, first_seed
        self._round, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, place: int) -> int:
        number, offset = divmod(place, self.size)
        if number != self._round:
            generator = torch.Generator().manual_seed(self.first_seed + number)
            self._round, self._order = number, torch.randperm(self.size, generator=generator)
        return int(self._order[offset])
