"""`SamplingConfig`: how images are drawn. Impossible combinations are refused when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mixhead.errors import MixheadError

Sampler = Literal["ddim", "dpm", "ancestral"]
LARGEST_GUIDANCE = 100.0


@dataclass(frozen=True)
class SamplingConfig:
    """How images are drawn.

    Attributes:
        steps: evaluations of the model per image.
        guidance: classifier-free guidance; 1 is none, more makes images more typical of their class.
        sampler: "ddim" (deterministic), "dpm" (DPM-Solver++, good from some 15 steps) or "ancestral" (the published
            one, with 250 steps).
        seed: of the noise.
        batch_size: images that are finished together; the images do not depend on it.
        group: images that pass through the model together, always: the last bits of a matrix product depend on its
            size. A group that is not full is filled up and costs as much as a full one.
    """

    steps: int = 50
    guidance: float = 1.0
    sampler: Sampler = "ddim"
    seed: int = 0
    batch_size: int = 32
    group: int = 4

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise MixheadError(f"steps={self.steps} draws nothing: at least 1 is needed, and 20 to 250 are usual.")
        for name in ("batch_size", "group"):
            if getattr(self, name) < 1:
                raise MixheadError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.seed < 0:
            raise MixheadError(f"seed={self.seed} must be at least 0.")
        if self.sampler not in get_args(Sampler):
            raise MixheadError(f"sampler={self.sampler!r} is unknown: choose one of {', '.join(get_args(Sampler))}.")
        if not 1.0 <= self.guidance <= LARGEST_GUIDANCE:
            raise MixheadError(
                f"guidance={self.guidance} must be between 1 (none) and {LARGEST_GUIDANCE:g}; 1.25 to 4 are usual. "
                "Less than 1 would draw away from the class, and images are garbage long before the limit."
            )
