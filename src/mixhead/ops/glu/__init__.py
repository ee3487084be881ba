"""The convolutional GLU of image models."""

from mixhead.ops.glu.api import convolutional_glu, explain_glu
from mixhead.ops.glu.engines import GLU_IMPLEMENTATIONS

__all__ = ["GLU_IMPLEMENTATIONS", "convolutional_glu", "explain_glu"]
