"""What tokens used, kept: listening to any model of this library, and the file that holds it."""

from mixhead.recording.file import Call, Recording, RecordingWriter
from mixhead.recording.listen import ExactLog, RoutingLog, keep_routing, record_routing

__all__ = ["Call", "ExactLog", "Recording", "RecordingWriter", "RoutingLog", "keep_routing", "record_routing"]
