"""What `impl="auto"` takes, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """Which implementation runs, and why, in a sentence."""

    impl: str
    reason: str
