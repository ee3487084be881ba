"""What all models do when they are saved."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any


class ReadableWeights:
    """Weights may be read by whom the configuration beside them may; safetensors writes them for their owner alone."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in the library that the model is built on."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        config = Path(save_directory) / "config.json"
        if config.is_file():  # of several processes one writes
            for weights in config.parent.glob("*.safetensors"):
                with contextlib.suppress(OSError):  # of another user, who left them there
                    weights.chmod(config.stat().st_mode & 0o777)
        return saved
