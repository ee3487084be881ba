"""`DemoConfig`: how much the demonstration does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoConfig:
    """How much the demonstration does; the defaults take some six minutes on two cores with AVX2.

    Attributes:
        active_heads: of SmolLM2's 9 heads, the mean over its layers.
        calibration_tokens: tokens that the routers are fitted to.
        tuning_tokens: tokens that each of the three models is tuned on.
        test_windows: windows of 512 held-out tokens for the perplexity.
        questions: of each lm-eval task.
        new_tokens: tokens that each model writes.
    """

    active_heads: int = 7
    calibration_tokens: int = 4_096
    tuning_tokens: int = 6_144
    test_windows: int = 8
    questions: int = 20
    new_tokens: int = 80
