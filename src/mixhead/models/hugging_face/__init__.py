"""Any attention model of transformers as a mixture-of-head model."""

from typing import TYPE_CHECKING

from mixhead.lazy import loaded_on_use

if TYPE_CHECKING:
    from mixhead.models.hugging_face.attention import attention_of, moh_attention_forward
    from mixhead.models.hugging_face.configuration import moh_config_class
    from mixhead.models.hugging_face.model import (
        MoHModelMixin,
        become_converted,
        change_class,
        forward_attribute,
        moh_model_class,
    )
    from mixhead.models.hugging_face.routers import attach_router, attach_routers, detach_router
    from mixhead.models.hugging_face.sites import AttentionSite, find_sites
    from mixhead.models.hugging_face.trace import RoutingTrace
else:
    __getattr__, __dir__ = loaded_on_use(
        __name__,
        {
            ".attention": ["attention_of", "moh_attention_forward"],
            ".configuration": ["moh_config_class"],
            ".model": ["MoHModelMixin", "become_converted", "change_class", "forward_attribute", "moh_model_class"],
            ".routers": ["attach_router", "attach_routers", "detach_router"],
            ".sites": ["AttentionSite", "find_sites"],
            ".trace": ["RoutingTrace"],
        },
    )

__all__ = [
    "AttentionSite",
    "MoHModelMixin",
    "RoutingTrace",
    "attach_router",
    "attach_routers",
    "attention_of",
    "become_converted",
    "change_class",
    "detach_router",
    "find_sites",
    "forward_attribute",
    "moh_attention_forward",
    "moh_config_class",
    "moh_model_class",
]
