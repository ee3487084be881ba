"""MoH-LLaMA: standard LLaMA weights under the published routing, as a causal language model of transformers.

The published model has no router weights, and its configuration says nothing about routing: the first half of the
heads is shared, and each token adds, from the other half, those with the largest query norms until three quarters of
all heads are active (arXiv 2410.11842, section 4.4).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mixhead.errors import MixheadError, first_line, listed
from mixhead.models.hugging_face import moh_config_class, moh_model_class
from mixhead.routing import BinaryRouter, LayerHeads

SHARED_SHARE, ACTIVE_SHARE = 0.5, 0.75

REQUIRED_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
# Keys beside the sizes that describe a file or a golden case and not the model. `auto_map` names code to execute.
DROPPED = (
    "_name_or_path", "architectures", "auto_map", "config", "dtype", "model_type", "note", "rotary_percent", "router",
    "shared_heads", "top_k", "torch_dtype", "transformers_version",
)  # fmt: skip
# Old state dicts keep the rotary tables, which the configuration determines.
BUFFER = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
LAYER = re.compile(r"^model\.layers\.(\d+)\.")
TIED = "lm_head.weight"


def moh_llama(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> PreTrainedModel:
    """MoH-LLaMA from weights under LLaMA's standard names.

    Args:
        config: sizes as in `LlamaConfig`, with `shared_heads` and `top_k` beside them or, as in the golden index, one
            level up (`{"config": sizes, "shared_heads": ..., "top_k": ...}`). Each that is absent follows the published
            rule: int(heads * 0.5) shared, int(heads * (0.75 - 0.5)) routed. A token is special (end of text, padding)
            only where the configuration names it.
        state_dict: the weights; copied. Their dtype becomes the model's; mixed dtypes become float32.

    Returns:
        A converted `LlamaForCausalLM` in evaluation mode.

    Raises:
        MixheadError: where configuration and weights do not fit each other.
    """
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise MixheadError(f"The weight {name} must be a tensor, but it is a {type(tensor).__name__}.")
    names = [name for name in state_dict if not BUFFER.search(name)]
    dtypes = {state_dict[name].dtype for name in names if state_dict[name].is_floating_point()}
    filling = LlamaFilling(config, names, "The state dict")
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    for name in names:
        filling.put(name, state_dict[name], dtype)
    return filling.finish()


def published_heads(num_heads: int) -> tuple[int, int]:
    """(shared heads, routed heads of each token) of the published model."""
    return int(num_heads * SHARED_SHARE), int(num_heads * (ACTIVE_SHARE - SHARED_SHARE))


def llama_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], LayerHeads]:
    """Arguments of `LlamaConfig` and the heads of every layer, from any form that `moh_llama` takes."""
    nested = config.get("config")
    sizes = dict(nested) if isinstance(nested, Mapping) else dict(config)
    if sizes.get("model_type", "llama") != "llama":
        raise MixheadError(f"The configuration is of a {sizes['model_type']!r} model, but MoH-LLaMA is a 'llama'.")
    if "quantization_config" in sizes:
        raise MixheadError("The configuration is of a quantised model (quantization_config), which is not supported.")
    if sizes.get("rotary_percent", 1.0) != 1.0:
        raise MixheadError(f"rotary_percent={sizes['rotary_percent']} is not supported: LLaMA rotates whole heads.")
    missing = [name for name in REQUIRED_SIZES if sizes.get(name) is None]
    if missing:
        raise MixheadError(f"The configuration does not say {', '.join(missing)}.")
    for name in (*REQUIRED_SIZES, *OPTIONAL_SIZES):
        value = sizes.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise MixheadError(f"{name}={value!r} in the configuration must be a whole number of at least 1.")
    num_heads = sizes["num_attention_heads"]
    key_value_heads = sizes.get("num_key_value_heads") or num_heads
    if num_heads % key_value_heads:
        raise MixheadError(f"num_key_value_heads={key_value_heads} must divide num_attention_heads={num_heads}.")
    if sizes.get("head_dim") is None and sizes["hidden_size"] % num_heads:
        raise MixheadError(
            f"hidden_size={sizes['hidden_size']} must be a multiple of num_attention_heads={num_heads}, unless "
            "head_dim is given."
        )
    given = {**sizes, **config}
    shared, top_k = (
        rule if given.get(name) is None else given[name]
        for name, rule in zip(("shared_heads", "top_k"), published_heads(num_heads), strict=True)
    )
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in (shared, top_k)) or not (
        1 <= shared + top_k <= num_heads
    ):
        raise MixheadError(
            f"shared_heads={shared!r} and top_k={top_k!r} must be whole numbers that together give at least 1 and at "
            f"most num_attention_heads={num_heads} active heads."
        )
    settings = {name: copy.deepcopy(value) for name, value in sizes.items() if name not in DROPPED}
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        settings.setdefault(token, None)  # LlamaConfig would take LLaMA 2's numbers, and generation would stop at them
    return settings, LayerHeads(num_heads, shared + top_k, shared)


def empty_moh_llama(settings: dict[str, Any], heads: LayerHeads) -> PreTrainedModel:
    """The model on the meta device: all names and shapes, no memory."""
    config_class: Any = moh_config_class(LlamaConfig)
    moh = {
        "router": "query_norm",
        "group_balanced": False,
        "balance_coefficient": 0.01,
        "layers": [asdict(heads) for _ in range(settings["num_hidden_layers"])],
        "original_attention": "sdpa",
    }
    try:
        config = config_class(**settings, moh=moh)
        with torch.device("meta"):
            return moh_model_class(LlamaForCausalLM)(config)
    except MixheadError:
        raise
    except Exception as error:  # transformers checks its configurations in many ways
        raise MixheadError(f"The configuration describes no LLaMA model: {first_line(error)}.") from error


class LlamaFilling:
    """An empty MoH-LLaMA that receives its weights one at a time, in any order, each with a copy of its own.

    Args:
        config: as `moh_llama` takes it.
        names: the weights that there are, to be checked before any is read.
        source: who says so, as the subject of a sentence.
    """

    def __init__(self, config: Mapping[str, Any], names: Iterable[str], source: str) -> None:
        settings, heads = llama_settings(config)
        given = {name for name in names if not BUFFER.search(name)}
        layers = max((int(match[1]) + 1 for name in given if (match := LAYER.match(name))), default=0)
        # Before the model is built: a wrong number may be a very large one.
        if layers != settings["num_hidden_layers"]:
            raise MixheadError(
                f"{source} has weights of {layers} layers, but the configuration describes "
                f"{settings['num_hidden_layers']}."
            )
        if settings.get("tie_word_embeddings") is None:
            settings["tie_word_embeddings"] = TIED not in given
        self.model = empty_moh_llama(settings, heads)
        self.shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        self.tied_head: Tensor | None = None
        allowed = self.shapes.keys() | ({TIED} if self.model.config.tie_word_embeddings else set())
        missing, unexpected = sorted(self.shapes.keys() - given), sorted(given - allowed)
        if missing or unexpected:
            raise MixheadError(
                f"{source} does not fit the configuration: missing {listed(missing)}, unexpected {listed(unexpected)}."
            )

    def put(self, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        """Copies one weight into the model."""
        shape = self.shapes[name] if name in self.shapes else self.shapes["model.embed_tokens.weight"]
        if tensor.shape != shape:
            raise MixheadError(f"The weight {name} must be {list(shape)}, but it is {list(tensor.shape)}.")
        if not tensor.is_floating_point():
            raise MixheadError(f"The weight {name} must be of a floating type, but it is {tensor.dtype}.")
        copied = torch.empty(shape, dtype=dtype, device=device).copy_(tensor.detach())
        if name not in self.shapes:
            self.tied_head = copied
            return
        owner, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(owner), leaf, nn.Parameter(copied))

    def finish(self) -> PreTrainedModel:
        """The whole model, in evaluation mode, once every weight has been put in."""
        model = self.model
        embeddings = model.get_input_embeddings().weight
        assert isinstance(embeddings, Tensor)
        if self.tied_head is not None and not torch.equal(self.tied_head, embeddings):
            raise MixheadError(
                f"The configuration says tie_word_embeddings, but {TIED} differs from model.embed_tokens.weight: set "
                "tie_word_embeddings to false to keep both."
            )
        for module in model.modules():
            if isinstance(module, BinaryRouter):
                module.to_empty(device=embeddings.device)
                module.reset_parameters()
        rotary = model.model.rotary_emb
        model.model.rotary_emb = type(rotary)(config=model.config).to(embeddings.device)
        model.tie_weights()
        model.config.dtype = embeddings.dtype
        left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
        assert not left, f"still without data: {left}"
        return model.eval()
