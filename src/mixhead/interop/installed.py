"""Files of weights inside installed packages, found without importing them: their own dependencies may be absent."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from mixhead.errors import MixheadError


def weights_in(package: str, ending: str, *, holds: str, install: str) -> Path:
    """The file with that ending in an installed package.

    Args:
        package: its name for pip.
        ending: of the file's name.
        holds: what the package is wanted for, for the message.
        install: the command that installs it.

    Raises:
        MixheadError: where the package is missing, or the file in it.
    """
    spec = importlib.util.find_spec(package.replace("-", "_"))
    locations = list(spec.submodule_search_locations or []) if spec is not None else []
    if not locations:
        raise MixheadError(f"The package {package}, which holds {holds}, is not installed; run `{install}`.")
    found = sorted(path for location in locations for path in Path(location).rglob(f"*{ending}"))
    if not found:
        raise MixheadError(f"The installed package {package} holds no {ending} file; run `{reinstall(package)}`.")
    return found[0]


def reinstall(package: str) -> str:
    """The command that mends a damaged package."""
    return f"pip install --force-reinstall --no-deps {package}"
