"""`head_attention` and its engines."""

from mixhead.ops.attention.api import head_attention
from mixhead.ops.attention.choose import explain
from mixhead.ops.attention.engines import IMPLEMENTATIONS

__all__ = ["IMPLEMENTATIONS", "explain", "head_attention"]
