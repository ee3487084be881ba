"""Any attention model of transformers as a mixture-of-head model."""

from mixhead.models.hugging_face.attention import attention_of, moh_attention_forward
from mixhead.models.hugging_face.model import (
    MoHModelMixin,
    moh_config_class,
    moh_model_class,
    register_models,
    register_with_transformers,
)
from mixhead.models.hugging_face.routers import LayerHeads, attach_router, attach_routers, detach_router
from mixhead.models.hugging_face.sites import AttentionSite, find_sites
from mixhead.models.hugging_face.trace import RoutingTrace

__all__ = [
    "AttentionSite",
    "LayerHeads",
    "MoHModelMixin",
    "RoutingTrace",
    "attach_router",
    "attach_routers",
    "attention_of",
    "detach_router",
    "find_sites",
    "moh_attention_forward",
    "moh_config_class",
    "moh_model_class",
    "register_models",
    "register_with_transformers",
]
