"""MoH-ViT: image classification with mixture-of-head attention on TransNeXt."""

from typing import TYPE_CHECKING

from mixhead.lazy import loaded_on_use

if TYPE_CHECKING:
    from mixhead.models.moh_vit.configuration import PUBLISHED, MoHTransNeXtConfig
    from mixhead.models.moh_vit.images import image_processor
    from mixhead.models.moh_vit.modeling import (
        MoHTransNeXtForImageClassification,
        MoHTransNeXtModel,
        MoHTransNeXtOutput,
    )
else:
    __getattr__, __dir__ = loaded_on_use(
        __name__,
        {
            ".configuration": ["PUBLISHED", "MoHTransNeXtConfig"],
            ".images": ["image_processor"],
            ".modeling": ["MoHTransNeXtForImageClassification", "MoHTransNeXtModel", "MoHTransNeXtOutput"],
        },
    )

__all__ = [
    "PUBLISHED",
    "MoHTransNeXtConfig",
    "MoHTransNeXtForImageClassification",
    "MoHTransNeXtModel",
    "MoHTransNeXtOutput",
    "image_processor",
]
