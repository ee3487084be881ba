"""The model types of this library, known to the Auto classes of transformers although neither is loaded before its use.

Each step when it is needed and not before. The configuration classes are registered as soon as transformers loads its
own table of them, from which every Auto class and `pipeline` start, and the way in which converted models are loaded
with its table of such ways. The model classes are registered when the first configuration of theirs is made
(`LoadsItsModels`), since their files bring all of transformers' modelling.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, ClassVar, Self

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
# The configurations of this library's model families. A new one is a folder in this room and a line here.
CONFIGURATIONS = [
    "mixhead.models.hugging_face.configuration.MixheadConfig",
    "mixhead.models.moa.configuration.MoAEncoderConfig",
    "mixhead.models.moa.configuration.MoATransformerConfig",
    "mixhead.models.moh_vit.configuration.MoHTransNeXtConfig",
]
AUTO_LOADING = "transformers.quantizers.auto"


def register_when_needed() -> None:
    """Registers what is ours in a table of transformers now if that is loaded, otherwise when it is."""
    for table, register in ((AUTO_CONFIG, register_configurations), (AUTO_LOADING, register_loading)):
        if table in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, TableFinder(table, register))


def register_configurations() -> None:
    """Tells `AutoConfig` the model types of this library."""
    from transformers import AutoConfig

    for place in CONFIGURATIONS:
        module, _, name = place.rpartition(".")
        config_class = getattr(importlib.import_module(module), name)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def register_loading() -> None:
    """Tells the loading of transformers what to do with the weights of a converted model."""
    importlib.import_module("mixhead.models.hugging_face.loading")


class TableFinder(MetaPathFinder):
    """Finds one module of transformers, and calls a function after it was loaded."""

    def __init__(self, table: str, register: Callable[[], None]) -> None:
        self.table, self.register = table, register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.table:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                self.register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


class LoadsItsModels:
    """A configuration class whose model classes are loaded, and so registered, when the first of its kind is made.

    Made is a configuration by a call, by a file, by a copy and by unpickling.

    Attributes:
        modeling: name of the module that holds the model classes and registers them with the Auto classes.
    """

    modeling: ClassVar[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        importlib.import_module(cls.modeling)
        return super().__new__(cls)
