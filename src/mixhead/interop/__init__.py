"""Published checkpoints: safe loading, and models from the official code's weights."""

from mixhead.interop.official import from_official

__all__ = ["from_official"]
