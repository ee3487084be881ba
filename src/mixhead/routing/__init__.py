"""Routing is a value: which heads each token uses, who decides it, and the losses that keep it balanced."""

from mixhead.routing.losses import balance_loss
from mixhead.routing.record import RoutingLog, StreamedLog, record_routing, stream_routing
from mixhead.routing.recording import Call, Recording, RecordingWriter
from mixhead.routing.router import Router
from mixhead.routing.routers import BinaryRouter, LinearRouter, QueryNormRouter, TwoStageRouter, soft_selection
from mixhead.routing.selection import grouped_top_k_mask, top_k_mask
from mixhead.routing.value import Routing

__all__ = [
    "BinaryRouter",
    "Call",
    "LinearRouter",
    "QueryNormRouter",
    "Recording",
    "RecordingWriter",
    "Router",
    "Routing",
    "RoutingLog",
    "StreamedLog",
    "TwoStageRouter",
    "balance_loss",
    "grouped_top_k_mask",
    "record_routing",
    "soft_selection",
    "stream_routing",
    "top_k_mask",
]
