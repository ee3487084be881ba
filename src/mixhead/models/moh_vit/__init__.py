"""MoH-ViT: image classification with mixture-of-head attention on TransNeXt."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from mixhead.models.moh_vit.configuration import PUBLISHED, MoHViTConfig
from mixhead.models.moh_vit.images import image_processor
from mixhead.models.moh_vit.modeling import MoHViTForImageClassification, MoHViTModel, MoHViTOutput

__all__ = [
    "PUBLISHED",
    "MoHViTConfig",
    "MoHViTForImageClassification",
    "MoHViTModel",
    "MoHViTOutput",
    "image_processor",
    "register_moh_vit",
]


def register_moh_vit() -> None:
    """Lets the Auto classes of transformers load MoH-ViT; called by `import mixhead`."""
    AutoConfig.register(MoHViTConfig.model_type, MoHViTConfig, exist_ok=True)
    AutoModel.register(MoHViTConfig, MoHViTModel, exist_ok=True)
    AutoModelForImageClassification.register(MoHViTConfig, MoHViTForImageClassification, exist_ok=True)
