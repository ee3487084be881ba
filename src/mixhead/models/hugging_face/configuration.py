"""Configurations of converted models, made from any configuration class of transformers.

Their `model_type` is "mixhead", and the file keeps the original configuration one level down beside a poisoned field,
so that a loader that does not know mixhead fails loudly instead of running all heads.
"""

from __future__ import annotations

import functools
import json
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from mixhead.errors import MixheadError

MODEL_TYPE = "mixhead"
# Every configuration class turns the keys of this field into numbers: one that is none stops, with its own text, any
# loader that ignores the model type.
POISONED_FIELD = "id2label"
POISON = {"This is a mixhead checkpoint: `import mixhead` and load it with an Auto class of transformers.": ""}


class MixheadConfig(PreTrainedConfig):
    """What transformers finds behind the model type "mixhead": it reads the file and hands over to the right class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration of the class that the checkpoint names."""
        # Not above: this class is registered when that module is loaded.
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        base_model_type = config_dict.get("base_model_type")
        if base_model_type not in CONFIG_MAPPING:
            raise MixheadError(
                f"This mixhead checkpoint was made from a model of type {base_model_type!r}, which the installed "
                "transformers does not know: install the version named in its config.json or a later one."
            )
        return moh_config_class(CONFIG_MAPPING[base_model_type]).from_dict(config_dict, **kwargs)


class MoHConfigMixin:
    """What a configuration needs to describe a converted model: `moh`, and its own form in the file."""

    model_type = MODEL_TYPE
    base_config_class: ClassVar[type[PreTrainedConfig]]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads the nested form of the file, and the flat one that `to_dict` gives."""
        from mixhead.models.hugging_face.model import register_models  # brings all of transformers' modelling

        if "base_config" in config_dict:
            outer = {k: v for k, v in config_dict.items() if k not in ("base_config", POISONED_FIELD)}
            config_dict = {**config_dict["base_config"], **outer}
        flat = {k: v for k, v in config_dict.items() if k not in ("model_type", "base_model_type")}
        check_description(flat.get("moh"))
        register_models(cls)  # type: ignore[arg-type]
        return super().from_dict(flat, **kwargs)  # type: ignore[misc]

    def to_json_string(self, use_diff: bool = True) -> str:
        """The form of the file; see the head of this module."""
        flat = json.loads(super().to_json_string(use_diff=use_diff))  # type: ignore[misc]
        outer = {key: flat.pop(key) for key in ("architectures", "moh", "transformers_version") if key in flat}
        flat.pop("model_type", None)
        nested = {
            "model_type": MODEL_TYPE,
            "base_model_type": self.base_config_class.model_type,
            "base_config": flat,
            POISONED_FIELD: POISON,
            **outer,
        }
        return json.dumps(nested, indent=2, sort_keys=True) + "\n"


def check_description(moh: Any) -> None:
    """Raises where what stands under `moh` in a configuration does not say how many heads and which router."""
    fields = {"layers", "router", "group_balanced", "balance_coefficient", "original_attention"}
    counts = ("num_heads", "active_heads", "shared_heads")
    known = isinstance(moh, dict) and fields <= {*moh} and isinstance(moh["layers"], list)
    if not known or not all(
        isinstance(layer, dict) and {*layer} == {*counts} and all(type(layer[count]) is int for count in counts)
        for layer in moh["layers"]
    ):
        raise MixheadError(
            "The configuration of this mixhead checkpoint does not say which heads each layer uses (moh): it is "
            "incomplete or was changed by hand."
        )


@functools.cache
def moh_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The configuration class of models converted from `base`'s."""
    return type(
        f"MoH{base.__name__}",
        (MoHConfigMixin, base),
        {"base_config_class": base, "model_type": MODEL_TYPE, "__module__": __name__},
    )
