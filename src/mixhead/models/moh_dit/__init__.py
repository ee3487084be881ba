"""MoH-DiT: class-conditional image generation with mixture-of-head attention in a diffusion transformer.

The network and its configuration are plain PyTorch. Sampling, and folders in the format of diffusers, need that package
(`pip install 'mixhead[diffusion]'`), which is imported where one of their names is used first.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mixhead.errors import MixheadError
from mixhead.models.moh_dit.configuration import PUBLISHED, MoHDiTConfig
from mixhead.models.moh_dit.modeling import MoHDiT, check_classes

if TYPE_CHECKING:
    from mixhead.models.moh_dit.diffusion import MoHDiTOutput, MoHDiTTransformer2DModel, load_dit
    from mixhead.models.moh_dit.pipeline import MoHDiTPipeline, ancestral_scheduler, denoise

__all__ = [
    "PUBLISHED",
    "MoHDiT",
    "MoHDiTConfig",
    "MoHDiTOutput",
    "MoHDiTPipeline",
    "MoHDiTTransformer2DModel",
    "ancestral_scheduler",
    "check_classes",
    "denoise",
    "load_dit",
]

NEEDS_DIFFUSERS = {
    "MoHDiTOutput": "diffusion",
    "MoHDiTTransformer2DModel": "diffusion",
    "load_dit": "diffusion",
    "MoHDiTPipeline": "pipeline",
    "ancestral_scheduler": "pipeline",
    "denoise": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in NEEDS_DIFFUSERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{NEEDS_DIFFUSERS[name]}"), name)
    except ModuleNotFoundError as missing:
        if missing.name != "diffusers":
            raise
        raise MixheadError(
            f"{name} needs the package diffusers, which is not installed: pip install 'mixhead[diffusion]'."
        ) from missing
