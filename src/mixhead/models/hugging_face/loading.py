"""How the classes of transformers load a converted model: the routers are put in place before the weights are read.

For modules that have to change first transformers has one plug-in, that of quantised weights. Nothing is quantised
here, and the loaded model keeps no trace of it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mixhead.errors import MixheadError
from mixhead.models.hugging_face.configuration import FILE_FIELDS, NAME, check_description, moh_config_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # which loads this file


@register_quantization_config(NAME)
@dataclass
class RoutedWeights(QuantizationConfigMixin):
    """What `quantization_config` in the file of a converted model says: that its weights belong to a routed model."""

    quant_method: Any = NAME


@register_quantizer(NAME)
class RoutedLoading(HfQuantizer):
    """Makes a stock model that transformers has built, and not yet filled, a converted one."""

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration to build the model from: that of a converted model."""
        refuse_tensor_parallelism(getattr(config, "distributed_config", None))
        return converted_configuration(config)

    def preprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Gives the empty model its class and its routers."""
        from mixhead.models.hugging_face.model import become_converted  # this file is loaded before modelling

        become_converted(model)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Leaves no trace."""
        del model.hf_quantizer

    def is_serializable(self) -> bool:
        """Whether what it loads may be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether what it loads may be trained."""
        return True


def refuse_tensor_parallelism(config: Any) -> None:
    """Refuses to split heads among processes: a router of each would choose among all of them.

    Args:
        config: the `DistributedConfig` of transformers; None where nothing is distributed.
    """
    if config is not None and (config.tp_size or 1) > 1:
        raise MixheadError(
            "A converted model cannot be split by tensor parallelism (tp_plan, tp_size): its routers choose among the "
            "heads of all processes. Load it whole in each process, or split its weights with fully_shard."
        )


def converted_configuration(config: PreTrainedConfig) -> PreTrainedConfig:
    """What a stock class read from the file of a converted model, as the configuration of one."""
    check_description(getattr(config, "moh", None))
    own = copy.deepcopy(config)
    own.__class__ = moh_config_class(type(config))  # type: ignore[arg-type]
    own._attn_implementation = None
    for field in FILE_FIELDS:
        vars(own).pop(field, None)
    return own
