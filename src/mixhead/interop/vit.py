"""MoH-ViT and dense TransNeXt from the official code's weights, and the published training checkpoints."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixhead.errors import MixheadError, listed
from mixhead.interop.safe_load import PUBLISHED_CLASSES, WRAPPERS, load_pickle, named_tensors
from mixhead.models.moh_vit import PUBLISHED, MoHTransNeXtConfig, MoHTransNeXtForImageClassification

# Official attribute of an attention module -> ours. In the last stage `qkv` is one layer, before it two, `q` and `kv`.
ATTENTION = {
    "temperature": "temperature",
    "query_embedding": "query_embedding",
    "relative_pos_bias_local": "local_bias",
    "learnable_tokens": "learnable_tokens",
    "learnable_bias": "learnable_bias",
    "q": "q_proj",
    "kv": "kv_proj",
    "qkv": "qkv_proj",
    "proj": "o_proj",
    "sr": "pool_proj",
    "norm": "pool_norm",
    "cpb_fc1": "position_bias.fc1",
    "cpb_fc2": "position_bias.fc2",
    "wg": "moh_router.routed_proj",
    "wg_0": "moh_router.stage_proj",
    "wg_1": "moh_router.shared_proj",
}
RULES = (
    (re.compile(r"patch_embed(\d+)\.(proj|norm)\.(weight|bias)"), r"embed.\2.\3"),
    (re.compile(r"norm(\d+)\.(weight|bias)"), r"norm.\2"),
    (re.compile(r"block(\d+)\.(\d+)\.(norm1|norm2|mlp\.fc1|mlp\.fc2)\.(weight|bias)"), r"blocks.\2.\3.\4"),
    (re.compile(r"block(\d+)\.(\d+)\.mlp\.dwconv\.dwconv\.(weight|bias)"), r"blocks.\2.mlp.dwconv.\3"),
)
IN_ATTENTION = re.compile(r"block(\d+)\.(\d+)\.attn\.(\w+)(\.weight|\.bias)?")
# Buffers that some versions of the official code kept in the file; the sizes determine them.
BUFFER = re.compile(r"(relative_pos_index|relative_coords_table|seq_length_scale|padding_mask|local_seq_length)\d*$")

# The official names of the configurations, as the checkpoints' command line (`--model`) and file names have them.
OFFICIAL_NAMES = {
    "moh_transnext_base_75": "moh-vit-b-75",
    "moh_transnext_base_50": "moh-vit-b-50",
    "moh_transnext_small_80": "moh-vit-s-80",
    "moh_transnext_small_75": "moh-vit-s-75",
    "transnext_tiny": "transnext-tiny",
    "transnext_small": "transnext-small",
    "transnext_base": "transnext-base",
}
ENTRIES = ("model", "state_dict")


def moh_vit(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> MoHTransNeXtForImageClassification:
    """MoH-ViT from weights under the official names.

    Args:
        config: sizes under the official argument names; without `shared_head` and `routed_head` a dense TransNeXt.
        state_dict: the weights; copied. Their dtype becomes the model's; mixed dtypes become float32.

    Returns:
        The model in evaluation mode.

    Raises:
        MixheadError: where configuration and weights do not fit each other.
    """
    return filled(official_config(config), state_dict)


def official_config(config: Mapping[str, Any]) -> MoHTransNeXtConfig:
    """Our configuration from the official argument names."""
    windows = {window for window in config["window_size"] if window is not None}
    if len(windows) > 1 or len(config["window_size"]) != len(config["embed_dims"]):
        raise MixheadError(
            f"window_size={config['window_size']} must name one window for all stages but the last, which has none."
        )
    return MoHTransNeXtConfig(
        image_size=config["img_size"],
        num_channels=config.get("in_chans", 3),
        patch_size=config["patch_size"],
        window_size=windows.pop() if windows else 3,
        hidden_sizes=tuple(config["embed_dims"]),
        num_heads=tuple(config["num_heads"]),
        mlp_ratios=tuple(config["mlp_ratios"]),
        qkv_bias=config["qkv_bias"],
        depths=tuple(config["depths"]),
        pool_ratios=tuple(config["sr_ratios"]),
        num_labels=config["num_classes"],
        shared_heads=whole_numbers(config.get("shared_head")),
        top_k=whole_numbers(config.get("routed_head")),
        drop_path_rate=config.get("drop_path_rate", 0.0),
    )


def whole_numbers(values: Any) -> tuple[int, ...] | None:
    """A list of the official configuration as ours has it."""
    return None if values is None else tuple(values)


def filled(config: MoHTransNeXtConfig, state_dict: Mapping[str, Tensor]) -> MoHTransNeXtForImageClassification:
    """The model of that configuration with the official weights, each a copy of its own."""
    renamed = {}
    for name, tensor in state_dict.items():
        plain = WRAPPERS.sub("", name)
        if BUFFER.search(plain):
            continue
        if not tensor.is_floating_point():
            raise MixheadError(f"The weight {name} must be of a floating type, but it is {tensor.dtype}.")
        renamed[our_name(plain)] = (name, tensor)
    with torch.device("meta"):
        model = MoHTransNeXtForImageClassification(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    missing, unexpected = sorted(shapes.keys() - renamed.keys()), sorted(renamed.keys() - shapes.keys())
    if missing or unexpected:
        raise MixheadError(
            f"The weights do not fit the configuration: missing {listed(missing)}, unexpected "
            f"{listed([renamed[name][0] for name in unexpected])}."
        )
    dtypes = {tensor.dtype for _, tensor in renamed.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    weights = {}
    for name, (official, tensor) in renamed.items():
        # Some official shapes have dimensions of size 1 that ours leave out.
        if [n for n in tensor.shape if n != 1] != [n for n in shapes[name] if n != 1]:
            raise MixheadError(
                f"The weight {official} must be {list(shapes[name])}, up to dimensions of size 1, but it is "
                f"{list(tensor.shape)}."
            )
        weights[name] = tensor.detach().to(dtype, copy=True).reshape(shapes[name])
    model.load_state_dict(weights, assign=True)
    model.config.dtype = dtype
    return model.eval()


def our_name(official: str) -> str:
    """An official parameter name in this library; one that no rule knows comes back as it is."""
    if official.startswith("head."):
        return official.replace("head.", "classifier.", 1)
    for pattern, ours in RULES:
        if match := pattern.fullmatch(official):
            return f"vit.stages.{int(match[1]) - 1}.{match.expand(ours)}"
    match = IN_ATTENTION.fullmatch(official)
    if match is None or match[3] not in ATTENTION:
        return official
    return f"vit.stages.{int(match[1]) - 1}.blocks.{match[2]}.attention.{ATTENTION[match[3]]}{match[4] or ''}"


def load_moh_vit(
    path: str | os.PathLike[str], name: str | None = None, *, verify: bool = True
) -> MoHTransNeXtForImageClassification:
    """A published MoH-ViT (`moh_transnext_base_75.pth`, ...) or dense TransNeXt checkpoint, without executing anything.

    The file is a training checkpoint: the weights stand under `model`, and the command line that trained them under
    `args`. Weights alone are taken as well.

    Args:
        path: the file.
        name: which of the published configurations it is. By default the checkpoint's command line says so, or else
            the name of the file: what cannot be seen from the weights is how many heads a token uses.
        verify: whether to compare the file's check sums first.

    Returns:
        The model in evaluation mode; `save_pretrained` writes a folder that the Auto classes load.

    Raises:
        MixheadError: where the file is missing, corrupt or asks for anything but tensors and plain values, the
            configuration is unknown, or the weights do not fit it.
    """
    file = Path(path)
    content = load_pickle(file, allow=PUBLISHED_CLASSES, verify=verify)
    entry = next((e for e in ENTRIES if isinstance(content, Mapping) and isinstance(content.get(e), Mapping)), None)
    weights = named_tensors(file, content, entry)
    arguments = content.get("args") if entry is not None else None
    config = published_config(name or name_of(file, arguments), weights, arguments)
    return filled(config, weights)


def name_of(file: Path, arguments: object) -> str:
    """The published configuration that a checkpoint's command line names, or else its file."""
    said = getattr(arguments, "model", None) if isinstance(arguments, argparse.Namespace) else None
    for official in (said, file.stem.split(".")[0]):
        if isinstance(official, str) and official in OFFICIAL_NAMES:
            return OFFICIAL_NAMES[official]
    raise MixheadError(
        f"{file} does not say which published configuration it is: give its name, one of {', '.join(PUBLISHED)}."
    )


def published_config(name: str, weights: Mapping[str, Tensor], arguments: object) -> MoHTransNeXtConfig:
    """The published configuration, with the number of classes of the weights and the trained size of the images."""
    heads = [weight for key, weight in weights.items() if WRAPPERS.sub("", key) == "head.weight"]
    if not heads or heads[0].dim() != 2:
        raise MixheadError("The checkpoint has no classifier (head.weight): it is no MoH-ViT or TransNeXt.")
    changes: dict[str, Any] = {"num_labels": heads[0].shape[0]}
    # Where it was tuned at another size, positions stay relative to the size of the pre-training.
    sizes = (getattr(arguments, key, None) for key in ("pretrain_size", "input_size"))
    trained = next((size for size in sizes if isinstance(size, int) and not isinstance(size, bool)), None)
    if trained is not None:
        changes["image_size"] = trained
    return MoHTransNeXtConfig.named(name, **changes)
