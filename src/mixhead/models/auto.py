"""The model types of this library, known to the Auto classes of transformers although neither is loaded before its use.

Two steps, each when it is needed and not before. The configuration classes are registered as soon as transformers loads
its own table of them, from which every Auto class and `pipeline` start. The model classes are registered when the first
configuration of theirs is made (`LoadsItsModels`), since their files bring all of transformers' modelling.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, ClassVar, Self

AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def register_when_needed() -> None:
    """Registers the configuration classes now if transformers has loaded its own, otherwise when it does."""
    if AUTO_CONFIG in sys.modules:
        register_configurations()
    else:
        sys.meta_path.insert(0, AutoConfigFinder())


def register_configurations() -> None:
    """Tells `AutoConfig` the model types of this library."""
    from transformers import AutoConfig

    from mixhead.models.hugging_face.configuration import MixheadConfig
    from mixhead.models.moa.configuration import MoAEncoderConfig, MoATransformerConfig
    from mixhead.models.moh_vit.configuration import MoHTransNeXtConfig

    for config_class in (MixheadConfig, MoAEncoderConfig, MoATransformerConfig, MoHTransNeXtConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


class AutoConfigFinder(MetaPathFinder):
    """Finds one module of transformers, and has the configuration classes registered after it was loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO_CONFIG:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register_configurations()

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
