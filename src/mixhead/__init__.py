"""Mixture-of-head attention: heads that are chosen per token, and that cost nothing when they are not."""

from typing import TYPE_CHECKING

from mixhead.errors import MixheadError
from mixhead.lazy import loaded_on_use
from mixhead.models.auto import register_when_needed

if TYPE_CHECKING:
    from mixhead import interop as interop
    from mixhead import nn as nn
    from mixhead import ops
    from mixhead import recording as recording
    from mixhead import routing as routing
    from mixhead import store as store
    from mixhead.convert import CalibrationConfig, CalibrationReport, MoHConfig, calibrate, convert, revert
    from mixhead.interop import from_official
    from mixhead.models.hugging_face import RoutingTrace
    from mixhead.nn import MixtureOfAttentionHeads, MixtureOfHeadAttention
    from mixhead.recording import Recording, RoutingLog, keep_routing, record_routing
    from mixhead.routing import Routing
    from mixhead.store import load, save
else:
    # The package `convert` is loaded now, and its name left to the function: loaded later, it would take it back.
    from mixhead import convert

    del convert
    __getattr__, __dir__ = loaded_on_use(
        __name__,
        {
            ".convert.calibration": ["CalibrationConfig", "CalibrationReport", "calibrate"],
            ".convert.config": ["MoHConfig"],
            ".convert.swap": ["convert", "revert"],
            ".interop": ["from_official", "interop"],
            ".models.hugging_face": ["RoutingTrace"],
            ".nn": ["MixtureOfAttentionHeads", "MixtureOfHeadAttention", "nn"],
            ".ops": ["ops"],
            ".recording": ["Recording", "RoutingLog", "keep_routing", "record_routing", "recording"],
            ".routing": ["Routing", "routing"],
            ".store": ["load", "save", "store"],
        },
    )

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
register_when_needed()
