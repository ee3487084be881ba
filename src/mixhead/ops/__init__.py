"""Operators that compute exactly the selected heads."""

from mixhead.ops.api import IMPLEMENTATIONS, Choice, explain, head_attention

__all__ = ["IMPLEMENTATIONS", "Choice", "explain", "head_attention"]
