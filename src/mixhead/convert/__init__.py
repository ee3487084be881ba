"""Any Hugging Face model to mixture-of-head attention and back."""

from mixhead.convert.calibrate import CalibrationConfig, CalibrationReport, calibrate
from mixhead.convert.config import MoHConfig
from mixhead.convert.dit import noised_batches
from mixhead.convert.swap import convert, revert

__all__ = ["CalibrationConfig", "CalibrationReport", "MoHConfig", "calibrate", "convert", "noised_batches", "revert"]
