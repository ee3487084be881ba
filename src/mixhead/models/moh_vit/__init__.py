"""MoH-ViT: image classification with mixture-of-head attention on TransNeXt."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from mixhead.models.moh_vit.configuration import PUBLISHED, MoHTransNeXtConfig
from mixhead.models.moh_vit.images import image_processor
from mixhead.models.moh_vit.modeling import MoHTransNeXtForImageClassification, MoHTransNeXtModel, MoHTransNeXtOutput

__all__ = [
    "PUBLISHED",
    "MoHTransNeXtConfig",
    "MoHTransNeXtForImageClassification",
    "MoHTransNeXtModel",
    "MoHTransNeXtOutput",
    "image_processor",
    "register_moh_vit",
]


def register_moh_vit() -> None:
    """Lets the Auto classes of transformers load MoH-ViT; called by `import mixhead`."""
    AutoConfig.register(MoHTransNeXtConfig.model_type, MoHTransNeXtConfig, exist_ok=True)
    AutoModel.register(MoHTransNeXtConfig, MoHTransNeXtModel, exist_ok=True)
    AutoModelForImageClassification.register(MoHTransNeXtConfig, MoHTransNeXtForImageClassification, exist_ok=True)
