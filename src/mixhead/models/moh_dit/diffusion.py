"""MoH-DiT as a model of diffusers: what `DiTPipeline` samples with, and what is saved to a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from mixhead.errors import MixheadError, first_line
from mixhead.models.calibrated import warn_of_random_heads
from mixhead.models.moh_dit.configuration import MoHDiTConfig
from mixhead.models.moh_dit.modeling import MoHDiT, rename_former_weights
from mixhead.models.saving import ReadableWeights
from mixhead.routing import Routing
from mixhead.shards import check_indexes

# Stands in the file as `norm_type`, which the DiT of diffusers reads first: it would otherwise build itself from the
# fields that it knows, find none of its weights, and go on with random ones.
POISON = "none: this is a mixhead checkpoint, load it with mixhead.models.moh_dit.MoHDiTTransformer2DModel"


@dataclass
class MoHDiTOutput(BaseOutput):
    """What a MoH-DiT returns.

    Attributes:
        sample: [B, out_channels, sample_size, sample_size].
        routing: with `output_routing`, one `Routing` per block that routes.
    """

    sample: Tensor
    routing: tuple[Routing, ...] | None = None


class MoHDiTTransformer2DModel(ReadableWeights, ModelMixin, ConfigMixin):
    """A MoH-DiT or dense DiT with the interface of diffusers' `DiTTransformer2DModel`; the network is its `dit`.

    The arguments are those of `MoHDiTConfig`, except that `out_channels` says whether the variance is predicted: it is
    `in_channels`, or twice as many.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("DiTBlock",)

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 8,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int | Sequence[int] = 16,
        head_dim: int | Sequence[int] | None = None,
        shared_heads: int | Sequence[int] | None = None,
        top_k: int | Sequence[int] | None = None,
        router: str = "two_stage",
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        null_class: bool = True,
        qkv_bias: bool = True,
        mlp_norm_eps: float = 1e-6,
        frequency_shift: int = 0,
        calibrated: bool = True,
        norm_type: str = POISON,
    ) -> None:
        super().__init__()
        if out_channels not in (in_channels, 2 * in_channels):
            raise MixheadError(f"out_channels={out_channels} must be in_channels={in_channels}, or twice as many.")
        given = locals()
        sizes = {field.name: given[field.name] for field in fields(MoHDiTConfig) if field.name in given}
        self.dit = MoHDiT(MoHDiTConfig(**sizes, learn_sigma=out_channels == 2 * in_channels))

    @classmethod
    def from_dit(cls, dit: MoHDiT) -> MoHDiTTransformer2DModel:
        """The model around a network, whose weights it shares."""
        sizes = {name: value for name, value in dit.config.to_dict().items() if name != "learn_sigma"}
        with torch.device("meta"):
            model = cls(**sizes, out_channels=dit.config.out_channels)
        model.dit = dit
        return model.train(dit.training)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        output_routing: bool = False,
        return_dict: bool = True,
    ) -> MoHDiTOutput | tuple[Any, ...]:
        """Predicts the noise, see `MoHDiT.forward`.

        Args:
            hidden_states: noised images or latents [B, channels, sample_size, sample_size].
            timestep: [B], or one for all.
            class_labels: [B].
            output_routing: whether to return the routing of every block that routes.
            return_dict: False for a plain tuple.
        """
        sample, routing = self.dit(hidden_states, timestep, class_labels, return_routing=True)
        output = MoHDiTOutput(sample=sample, routing=routing if output_routing else None)
        return output if return_dict else output.to_tuple()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; says where the routers would be saved as random as they are."""
        if not self.dit.config.calibrated:
            warn_of_random_heads(self.dit, self.dit.config.router)
        self.register_to_config(calibrated=self.dit.config.calibrated)
        super().save_pretrained(*args, **kwargs)

    def _fix_state_dict_keys_on_load(self, state_dict: Any) -> None:
        """Called by diffusers with the weights that it has read."""
        super()._fix_state_dict_keys_on_load(state_dict)
        rename_former_weights(None, state_dict)


def load_dit(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> MoHDiT:
    """The network in a folder that a `MoHDiTTransformer2DModel` or a `MoHDiTPipeline` was saved to, in evaluation mode.

    Args:
        path: the folder; of a pipeline, the model lies in its folder `transformer`.
        dtype: of the weights; by default the one that they were saved in.

    Raises:
        MixheadError: where a file is missing, truncated or corrupt, or weights and configuration do not fit.
    """
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        folder = folder / "transformer"
    if not (folder / "config.json").is_file():
        raise MixheadError(f"{folder} is no folder of a diffusion model: config.json is missing.")
    check_indexes(folder)
    try:
        model, info = MoHDiTTransformer2DModel.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (MixheadError, MemoryError):
        raise
    except Exception as error:  # diffusers, safetensors and json raise many types on corrupt files
        raise MixheadError(
            f"The model in {folder} cannot be loaded: a file is truncated, corrupt or missing, or they do not belong "
            f"together ({first_line(error)})."
        ) from error
    wrong = {kind: names for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if (names := info[kind])}
    if wrong:
        raise MixheadError(f"The weights in {folder} do not fit its config.json: {wrong}.")
    return model.dit.eval()
