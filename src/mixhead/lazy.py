"""Names of a package that are loaded when they are used first, so that importing the package costs nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def loaded_on_use(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562) for names that live in its modules.

    Editors and type checkers need the same names imported under `if TYPE_CHECKING`.

    Args:
        package: its `__name__`.
        homes: for each module, written as in an import (".swap" lies inside the package), the names that the package
            has from it; a module may give itself. No other name may be that of a module of the package: once imported,
            the module would take its place.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(home_of[name], package)
        value = module if home_of[name] == f".{name}" else getattr(module, name)
        setattr(sys.modules[package], name, value)  # found without this function from now on
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home_of})

    return get, names
