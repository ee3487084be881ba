"""Mixture-of-head attention: heads that are chosen per token, and that cost nothing when they are not."""

from mixhead import ops
from mixhead.convert import CalibrationConfig, CalibrationReport, MoHConfig, calibrate, convert, revert
from mixhead.errors import MixheadError
from mixhead.interop import from_official
from mixhead.models.hugging_face import RoutingTrace, register_with_transformers
from mixhead.models.moa import register_moa
from mixhead.models.moh_vit import register_moh_vit
from mixhead.nn import MixtureOfAttentionHeads, MixtureOfHeadAttention
from mixhead.recording import Recording, RoutingLog, keep_routing, record_routing
from mixhead.routing import Routing
from mixhead.store import load, save

__version__ = "0.1.0"

__all__ = [
    "CalibrationConfig",
    "CalibrationReport",
    "MixheadError",
    "MixtureOfAttentionHeads",
    "MixtureOfHeadAttention",
    "MoHConfig",
    "Recording",
    "Routing",
    "RoutingLog",
    "RoutingTrace",
    "calibrate",
    "convert",
    "from_official",
    "keep_routing",
    "load",
    "ops",
    "record_routing",
    "revert",
    "save",
]

# The one thing done at import: transformers can only load a model type that it has been told about.
register_with_transformers()
register_moh_vit()
register_moa()
