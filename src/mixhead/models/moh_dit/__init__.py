"""MoH-DiT: class-conditional image generation with mixture-of-head attention in a diffusion transformer."""

from mixhead.models.moh_dit.attention import DiTAttention
from mixhead.models.moh_dit.configuration import PUBLISHED, MoHDiTConfig
from mixhead.models.moh_dit.modeling import MoHDiT, check_classes, guided

__all__ = ["PUBLISHED", "DiTAttention", "MoHDiT", "MoHDiTConfig", "check_classes", "guided"]
