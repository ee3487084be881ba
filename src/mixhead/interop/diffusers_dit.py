"""Dense DiTs in the format of diffusers (`DiTTransformer2DModel`)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixhead.errors import MixheadError, first_line
from mixhead.files import read_json
from mixhead.interop.dit import swap_stem
from mixhead.interop.weights import check_fit
from mixhead.models.moh_dit import MoHDiT, MoHDiTConfig
from mixhead.models.moh_dit.modeling import position_embedding
from mixhead.shards import check_indexes

# Older folders name the class of which DiTTransformer2DModel was a part then.
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
OUTSIDE = {"pos_embed.proj": "patch_embed", "proj_out_1": "final.modulation", "proj_out_2": "final.proj"}
IN_BLOCK = {
    "norm1.linear": "modulation",
    "attn1.to_q": "attention.q_proj",
    "attn1.to_k": "attention.k_proj",
    "attn1.to_v": "attention.v_proj",
    "attn1.to_out.0": "attention.o_proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
# Every block has an embedding of time and class of its own, all equal in a DiT.
EMBEDDING = {
    "norm1.emb.timestep_embedder.linear_1": "time_embed.fc1",
    "norm1.emb.timestep_embedder.linear_2": "time_embed.fc2",
    "norm1.emb.class_embedder.embedding_table": "class_embed",
}
BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


def is_diffusers_dit(path: str | os.PathLike[str]) -> bool:
    """Whether a folder, or the `transformer` of a pipeline's folder, holds a DiT of diffusers."""
    return class_name(transformer_folder(path)) in CLASSES


def class_name(folder: Path) -> str | None:
    """What a folder of diffusers says that it holds; None where it is no such folder."""
    try:
        name = read_json(folder / "config.json").get("_class_name")
    except MixheadError:
        return None
    return name if isinstance(name, str) else None


def transformer_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of the model; of a pipeline, the one inside."""
    folder = Path(path)
    return folder / "transformer" if (folder / "model_index.json").is_file() else folder


def load_diffusers_dit(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> MoHDiT:
    """A dense DiT from a folder of diffusers' `DiTTransformer2DModel` or `DiTPipeline`, in evaluation mode.

    It computes what the model computes in diffusers, whose time embedding and one norm differ slightly from the
    published ones (`frequency_shift` and `mlp_norm_eps` of the configuration).

    Args:
        path: the folder.
        dtype: of the weights; by default float32.

    Raises:
        MixheadError: where diffusers is missing, or the folder holds no DiT that can be read.
    """
    folder = transformer_folder(path)
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        raise MixheadError(
            "Reading a folder of diffusers needs that package, which is not installed: pip install "
            "'mixhead[diffusion]'."
        ) from error
    check_indexes(folder)
    try:
        model = DiTTransformer2DModel.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    except MemoryError:
        raise
    except Exception as error:  # diffusers, safetensors and json raise many types on corrupt files
        raise MixheadError(f"{folder} holds no DiT of diffusers that can be read ({first_line(error)}).") from error
    return from_diffusers(model.config, model.state_dict())


def from_diffusers(config: Any, state_dict: Mapping[str, Tensor]) -> MoHDiT:
    """A dense DiT from the configuration and weights of a `DiTTransformer2DModel`; the weights are not copied."""
    ours = our_config(config, state_dict)
    with torch.device("meta"):
        model = MoHDiT(ours)
    weights = rename(state_dict)
    dtype = weights["patch_embed.weight"].dtype
    weights["pos_embed"] = position_embedding(ours.hidden_size, ours.sample_size // ours.patch_size).to(dtype)
    check_fit(model, weights)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def our_config(config: Any, state_dict: Mapping[str, Tensor]) -> MoHDiTConfig:
    """Our configuration; raises for variants that no DiT has."""
    if config.norm_elementwise_affine or config.activation_fn != "gelu-approximate" or config.dropout:
        raise MixheadError(
            "This transformer of diffusers is no DiT: it has weights in its norms, another activation or dropout."
        )
    in_channels = config.in_channels
    out_channels = config.out_channels or in_channels
    if out_channels not in (in_channels, 2 * in_channels):
        raise MixheadError(f"out_channels={out_channels} must be in_channels={in_channels}, or twice as many.")
    classes = state_dict["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"].shape[0]
    return MoHDiTConfig(
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        in_channels=in_channels,
        hidden_size=config.num_attention_heads * config.attention_head_dim,
        depth=config.num_layers,
        num_heads=config.num_attention_heads,
        num_classes=classes - 1,
        learn_sigma=out_channels == 2 * in_channels,
        qkv_bias=config.attention_bias,
        mlp_norm_eps=config.norm_eps,
        frequency_shift=1,
    )


def rename(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names to ours; the embeddings of all blocks must be equal and become one."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        block = BLOCK.fullmatch(name)
        if block is None:
            if name != "pos_embed.pos_embed":  # fixed, and computed anew
                renamed[swap_stem(name, OUTSIDE)] = tensor
        elif block[2].startswith("norm1.emb."):
            first = renamed.setdefault(swap_stem(block[2], EMBEDDING), tensor)
            if not first.equal(tensor):
                raise MixheadError(
                    f"{name} differs from the first block's: a DiT has one embedding of time and class for all blocks."
                )
        else:
            renamed[f"blocks.{block[1]}.{swap_stem(block[2], IN_BLOCK)}"] = tensor
    return renamed
