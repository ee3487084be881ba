"""MoH-DiT and dense DiT under the official names: attention layers, whole models, the published checkpoints.

The official code fuses queries, keys and values into one matrix, laid out (3, heads, head_dim).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixhead.errors import MixheadError, first_line
from mixhead.files import writing
from mixhead.interop.safe_load import WRAPPERS, load_pickle, named_tensors
from mixhead.interop.weights import check_fit, load_exactly
from mixhead.models.moh_dit import PUBLISHED, MoHDiT, MoHDiTConfig
from mixhead.nn import MixtureOfHeadAttention

QKV = ("q_proj", "k_proj", "v_proj")
ROUTER = {"wg": "routed_proj", "wg_0": "stage_proj", "wg_1": "shared_proj"}
# Official name of everything outside attention -> ours.
OUTSIDE = {
    "pos_embed": "pos_embed",
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "time_embed.fc1",
    "t_embedder.mlp.2": "time_embed.fc2",
    "y_embedder.embedding_table": "class_embed",
    "final_layer.adaLN_modulation.1": "final.modulation",
    "final_layer.linear": "final.proj",
}
IN_BLOCK = {"adaLN_modulation.1": "modulation", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")


def moh_dit_attention(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> MixtureOfHeadAttention:
    """One MoH attention layer of the official DiT."""
    attention = MixtureOfHeadAttention(
        config["dim"],
        config["num_heads"],
        config["shared_heads"],
        config["top_k"],
        head_dim=config["head_dim"],
        bias="qkv.bias" in state_dict,
    )
    load_exactly(attention, rename_attention(state_dict))
    return attention


def moh_dit(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> MoHDiT:
    """A whole MoH-DiT or dense DiT of the official code, in evaluation mode.

    Args:
        config: sizes under the official argument names; numbers per layer may be lists or one number for all.
        state_dict: weights under the official parameter names; copied. Their dtype becomes the model's.

    Raises:
        MixheadError: where configuration and weights do not fit each other.
    """
    copies = {name: tensor.detach().clone() for name, tensor in state_dict.items()}
    return filled(official_config(config, state_dict), copies)


def filled(config: MoHDiTConfig, state_dict: Mapping[str, Tensor]) -> MoHDiT:
    """The model of that configuration around weights under the official names, which are not copied."""
    with torch.device("meta"):
        model = MoHDiT(config)
    weights = rename_model(state_dict)
    check_fit(model, weights)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def official_config(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> MoHDiTConfig:
    """Our configuration from the official argument names."""
    routed = bool(config.get("moh", "routed_head" in config))
    return MoHDiTConfig(
        sample_size=config["input_size"],
        patch_size=config["patch_size"],
        in_channels=config["in_channels"],
        hidden_size=config["hidden_size"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        head_dim=config.get("head_dim"),
        shared_heads=config["shared_head"] if routed else None,
        top_k=config["routed_head"] if routed else None,
        mlp_ratio=config.get("mlp_ratio", 4.0),
        num_classes=config["num_classes"],
        null_class=config.get("class_dropout_prob", 0.1) > 0,
        learn_sigma=config.get("learn_sigma", True),
        qkv_bias=any(name.endswith("attn.qkv.bias") for name in state_dict),
    )


def rename_model(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names of a whole model to ours; a name that no rule knows stays as it is."""
    renamed: dict[str, Tensor] = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        block = BLOCK.fullmatch(name)
        if block is None:
            renamed[swap_stem(name, OUTSIDE)] = tensor
        elif block[2].startswith("attn."):
            attention.setdefault(block[1], {})[block[2].removeprefix("attn.")] = tensor
        else:
            renamed[block[1] + swap_stem(block[2], IN_BLOCK)] = tensor
    for block_name, weights in attention.items():
        for name, tensor in rename_attention(weights).items():
            renamed[f"{block_name}attention.{name}"] = tensor
    return renamed


def rename_attention(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names of an attention layer to ours."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        stem, _, suffix = name.rpartition(".")
        if stem == "qkv":
            for projection, part in zip(QKV, tensor.chunk(3), strict=True):
                renamed[f"{projection}.{suffix}"] = part
        elif stem == "proj":
            renamed[f"o_proj.{suffix}"] = tensor
        else:
            renamed[f"router.{ROUTER[stem]}.{suffix}" if stem in ROUTER else name] = tensor
    return renamed


def swap_stem(name: str, names: Mapping[str, str]) -> str:
    """The name with what comes before `.weight` or `.bias` replaced."""
    if name in names:
        return names[name]
    stem, _, suffix = name.rpartition(".")
    return f"{names[stem]}.{suffix}" if stem in names else name


# ------------------------------------------------------------------------------------------ checkpoints of the training

EMA, MODEL = "ema", "model"


def load_moh_dit(
    path: str | os.PathLike[str], config: MoHDiTConfig | str | None = None, *, verify: bool = True
) -> MoHDiT:
    """A MoH-DiT or dense DiT from a `.pt` file of the official training (`7000000.pt`), or from a bare state dict.

    Of a training checkpoint (entries `model`, `ema`, `opt`, `args`) only the averaged weights, `ema`, are taken. They
    stay in the file, mapped into memory, until they are read, so the file has to stay; it is never written to.

    Args:
        path: the file.
        config: the sizes, or the name of a published configuration; by default the published one that fits the weights.
        verify: whether to compare check sums first, which reads the file once.

    Raises:
        MixheadError: where the file holds anything but tensors and plain values, or fits no configuration.
    """
    file = Path(path)
    content = load_pickle(file, verify=verify)
    weights = {WRAPPERS.sub("", name): tensor for name, tensor in named_tensors(file, *entry_of(content)).items()}
    if isinstance(config, MoHDiTConfig):
        return filled(config, weights)
    return filled(published_config(weights, [config] if config else list(PUBLISHED)), weights)


def entry_of(content: Any) -> tuple[Any, str | None]:
    """The content of a file and the entry of it that holds the weights to use, None where it is the state dict."""
    if isinstance(content, Mapping):
        for entry in (EMA, MODEL):
            if isinstance(content.get(entry), Mapping):
                return content, entry
    return content, None


def is_dit_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file of `torch.save` holds the weights of a DiT under the official names."""
    content, entry = entry_of(load_pickle(path, verify=False))
    weights = content if entry is None else content[entry]
    return isinstance(weights, Mapping) and any(str(name).endswith("x_embedder.proj.weight") for name in weights)


def published_config(weights: Mapping[str, Tensor], names: Sequence[str]) -> MoHDiTConfig:
    """The published configuration among `names` that fits the weights, for their input, patches and classes."""
    try:
        width, in_channels, patch, _ = weights["x_embedder.proj.weight"].shape
        tokens = weights["pos_embed"].shape[1]
        classes = weights["y_embedder.embedding_table.weight"].shape[0]
        out_channels = weights["final_layer.linear.weight"].shape[0] // patch**2
    except (KeyError, ValueError, IndexError) as error:
        raise MixheadError(f"The weights are none of a DiT: there is no usable {error}.") from error
    depth = len({match[1] for name in weights if (match := BLOCK.fullmatch(name))})
    found = {name: tensor.shape for name, tensor in rename_model(weights).items()}
    for name in names:
        config = MoHDiTConfig.named(
            name,
            sample_size=math.isqrt(tokens) * patch,
            patch_size=patch,
            in_channels=in_channels,
            num_classes=max(classes - 1, 1),
            learn_sigma=out_channels == 2 * in_channels,
        )
        if (config.hidden_size, config.depth) == (width, depth) and shapes_of(config) == found:
            return config
    raise MixheadError(
        f"The weights, {width} wide and {depth} deep, fit none of these configurations: {', '.join(names)}. "
        "Give the MoHDiTConfig that they were made with."
    )


def shapes_of(config: MoHDiTConfig) -> dict[str, torch.Size]:
    """Shapes of all weights of a model of that configuration."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in MoHDiT(config).state_dict().items()}


def export_moh_dit(dit: MoHDiT, path: str | os.PathLike[str]) -> None:
    """Writes a checkpoint that the official sampling script reads: entries `ema` and `model`, official names.

    Raises:
        MixheadError: where the model has no official form, being a converted dense DiT, or the file cannot be written.
    """
    if dit.config.router != "two_stage" and any(dit.config.routes):
        raise MixheadError(
            f"The official code has no {dit.config.router!r} router: only a MoH-DiT with the two-stage router, or a "
            "dense DiT, can be exported."
        )
    weights = official_names(dit.state_dict())
    file = Path(path).resolve()
    try:
        with writing(file) as partial:
            torch.save({MODEL: weights, EMA: weights}, partial)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where its writer cannot write
        raise MixheadError(f"{file} could not be written ({first_line(error)}).") from error


def official_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `rename_model` undoes: our names to the official ones, queries, keys and values in one matrix."""
    outside, in_block = ({ours: theirs for theirs, ours in names.items()} for names in (OUTSIDE, IN_BLOCK))
    router = {f"router.{ours}": f"attn.{theirs}" for theirs, ours in ROUTER.items()}
    in_attention = {"o_proj": "attn.proj", **router}
    official: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        block = BLOCK.fullmatch(name)
        if block is None:
            official[swap_stem(name, outside)] = tensor.detach()
        elif not block[2].startswith("attention."):
            official[block[1] + swap_stem(block[2], in_block)] = tensor.detach()
        elif "q_proj" in name:
            parts = [state_dict[name.replace("q_proj", projection)].detach() for projection in QKV]
            official[f"{block[1]}attn.qkv.{name.rpartition('.')[2]}"] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            official[block[1] + swap_stem(block[2].removeprefix("attention."), in_attention)] = tensor.detach()
    return official
