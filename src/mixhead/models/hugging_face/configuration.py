"""Configurations of converted models, made from any configuration class of transformers.

In memory such a configuration is its original with `moh` beside it: the same class name and `model_type`, so that every
tool that asks by either finds what it knows. The file says the same, with three fields of transformers that concern
models alone (`FILE_FIELDS`): tokenizers, processors and configurations open anywhere, and weights are never loaded
without routing.
"""

from __future__ import annotations

import copyreg
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from mixhead.errors import MixheadError
from mixhead.models.hugging_face.card import write_card

NAME = "mixhead"
FILE_FIELDS = {
    # Who knows mixhead is led by this to `loading`, which puts the routers in place before the weights are read.
    "quantization_config": {"quant_method": NAME},
    # Who does not stops here, where a name of a weight file is expected, and shows this.
    "transformers_weights": "This is a mixhead checkpoint: `import mixhead` before the model is loaded.",
    # A model that is built from the configuration alone asks for this attention: unknown there, and refused here.
    "attn_implementation": NAME,
}
# What files written by earlier versions of this library have, where the original configuration lay one level down.
NESTED, NESTED_TYPE, POISONED_FIELD = "base_config", "base_model_type", "id2label"


class MixheadConfig(PreTrainedConfig):
    """What transformers finds behind the model type "mixhead" of earlier files: it hands over to the right class."""

    model_type = NAME

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration of the class that the checkpoint names."""
        # Not above: this class is registered when that module is loaded.
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        base_model_type = config_dict.get(NESTED_TYPE)
        if base_model_type not in CONFIG_MAPPING:
            raise MixheadError(
                f"This mixhead checkpoint was made from a model of type {base_model_type!r}, which the installed "
                "transformers does not know: install the version named in its config.json or a later one."
            )
        return moh_config_class(CONFIG_MAPPING[base_model_type]).from_dict(config_dict, **kwargs)


class MoHConfigMixin:
    """What a configuration needs to describe a converted model: `moh`, and its own form in the file."""

    base_config_class: ClassVar[type[PreTrainedConfig]]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads the form of the file, that of earlier files, and the one that `to_dict` gives.

        A file of the original stays one: PEFT looks at the folder that a model came from before it was converted.
        """
        if config_dict.keys().isdisjoint({"moh", NESTED, "transformers_weights"}):
            return cls.base_config_class.from_dict(config_dict, **kwargs)
        if NESTED in config_dict:
            outer = {k: v for k, v in config_dict.items() if k not in (NESTED, NESTED_TYPE, POISONED_FIELD)}
            config_dict = {**config_dict[NESTED], **outer, "model_type": config_dict[NESTED_TYPE]}
        # The model type stays, for models that run under the class of another: their weights have names by it.
        flat = {k: v for k, v in config_dict.items() if k not in FILE_FIELDS}
        check_description(flat.get("moh"))
        registered(cls)
        return super().from_dict(flat, **kwargs)  # type: ignore[misc]

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Writes the form of the file; see the head of this module."""
        described = json.loads(self.to_json_string(use_diff=use_diff))  # type: ignore[attr-defined]
        text = json.dumps({**described, **FILE_FIELDS}, indent=2, sort_keys=True) + "\n"
        Path(json_file_path).write_text(text, encoding="utf-8")

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Writes config.json, and a README.md that says how to load the folder where there is none."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        write_card(Path(save_directory), self)


def check_description(moh: Any) -> None:
    """Raises where what stands under `moh` in a configuration does not say how many heads and which router."""
    fields = {"layers", "router", "group_balanced", "balance_coefficient", "original_attention"}
    counts = ("num_heads", "active_heads", "shared_heads")
    known = isinstance(moh, dict) and fields <= {*moh} and isinstance(moh["layers"], list)
    known = known and isinstance(moh["router"], str) and isinstance(moh["group_balanced"], bool)
    known = known and isinstance(moh["balance_coefficient"], int | float)
    if not known or not all(
        isinstance(layer, dict) and {*layer} == {*counts} and all(type(layer[count]) is int for count in counts)
        for layer in moh["layers"]
    ):
        raise MixheadError(
            "The configuration of this mixhead checkpoint does not say which heads each layer uses (moh): it is "
            "incomplete or was changed by hand."
        )


class MoHConfigType(type):
    """The type of the classes below: pickled as what they are made from, since they have the names of others.

    The class is, and not its instances, because torch.compile knows no other way to copy those than Python's.
    """


@functools.cache
def moh_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The configuration class of models converted from `base`'s, under the name of `base`."""
    return MoHConfigType(base.__name__, (MoHConfigMixin, base), {"base_config_class": base, **name_of(base)})


def registered_config_class(base: type[PreTrainedConfig]) -> Any:
    """The same, known to the Auto classes with its models: what unpickling begins with."""
    return registered(moh_config_class(base))  # type: ignore[arg-type]


def registered(config_class: Any) -> Any:
    """The class, once the Auto classes know its models."""
    from mixhead.models.hugging_face.model import register_models  # brings all of transformers' modelling

    register_models(config_class)
    return config_class


copyreg.pickle(MoHConfigType, lambda made: (registered_config_class, (made.base_config_class,)))  # type: ignore[attr-defined]


def name_of(base: type) -> dict[str, Any]:
    """The members by which a class made from `base` answers to its name."""
    return {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}


def new_instance(make_class: Callable[[type], type], base: type) -> Any:
    """An empty instance of a class made from `base`: what unpickling and copying begin with."""
    made: Any = make_class(base)
    return made.__new__(made)
