"""Any Hugging Face model to mixture-of-head attention and back."""

from typing import TYPE_CHECKING

from mixhead.lazy import loaded_on_use

if TYPE_CHECKING:
    from mixhead.convert.calibration import CalibrationConfig, CalibrationReport, calibrate
    from mixhead.convert.config import MoHConfig
    from mixhead.convert.dit import noised_batches
    from mixhead.convert.swap import convert, revert
else:
    __getattr__, __dir__ = loaded_on_use(
        __name__,
        {
            ".calibration": ["CalibrationConfig", "CalibrationReport", "calibrate"],
            ".config": ["MoHConfig"],
            ".dit": ["noised_batches"],
            ".swap": ["convert", "revert"],
        },
    )

__all__ = [
    "CalibrationConfig",
    "CalibrationReport",
    "MoHConfig",
    "calibrate",
    "convert",
    "noised_batches",
    "revert",
]
