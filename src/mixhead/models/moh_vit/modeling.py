"""MoH-ViT: a four-stage image classifier (TransNeXt, arXiv 2311.17132) with mixture-of-head attention.

Shape legend: B batch, N = Y * X tokens of a map, C hidden size, M width inside the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from mixhead.errors import MixheadError
from mixhead.models.moh_vit.attention import AggregatedAttention, CosineAttention, GlobalAttention
from mixhead.models.moh_vit.configuration import MoHTransNeXtConfig
from mixhead.models.moh_vit.positions import RelativePositions, Size, relative_positions
from mixhead.models.saving import ReadableWeights
from mixhead.ops import convolutional_glu
from mixhead.plain import is_plain
from mixhead.routing import OneStageRouter, Routing, TwoStageRouter, mean_balance_loss

# softplus of the initial temperature is 1 / 0.24.
INITIAL_TEMPERATURE = math.log(math.expm1(1 / 0.24))
# The published recipe excludes these from weight decay, beside biases and norms.
NO_WEIGHT_DECAY = ("query_embedding", "local_bias", "position_bias", "temperature")


@dataclass
class MoHTransNeXtOutput(ModelOutput):
    """What a MoH-ViT returns.

    Attributes:
        loss: where labels were given: the cross entropy and, in training mode, the balance loss times its coefficient.
        logits: [B, labels].
        balance_loss: mean over the layers whose heads compete; in training mode, and with `output_routing`.
        hidden_states: with `output_hidden_states`, the map after each stage, [B, C, Y, X].
        routing: with `output_routing`, one `Routing` per block that has gates.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    balance_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    routing: tuple[Routing, ...] | None = None


class PatchEmbedding(nn.Module):
    """Overlapping patches: a convolution that shrinks the map, and a norm. [B, C, Y, X] -> [B, N, C] and the size."""

    def __init__(self, in_channels: int, hidden_size: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size, stride, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(hidden_size)  # with PyTorch's eps of 1e-5, unlike the norms of blocks and stages

    def forward(self, map_BCYX: Tensor) -> tuple[Tensor, Size]:
        map_BCYX = self.proj(map_BCYX)
        rows, columns = map_BCYX.shape[-2:]
        return self.norm(map_BCYX.flatten(2).transpose(1, 2)), (rows, columns)


class ConvolutionalGLU(nn.Module):
    """A gated MLP whose gate sees its neighbours through a depthwise convolution."""

    def __init__(self, hidden_size: int, ratio: float) -> None:
        super().__init__()
        width = int(2 * int(hidden_size * ratio) / 3)
        self.fc1 = nn.Linear(hidden_size, 2 * width)
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.fc2 = nn.Linear(width, hidden_size)

    def forward(self, hidden_BNC: Tensor, size: Size) -> Tensor:
        if not (is_plain(self.fc1, nn.Linear) and is_plain(self.dwconv, nn.Conv2d)):
            gate_BNM, value_BNM = self.fc1(hidden_BNC).chunk(2, -1)
            map_BMYX = self.dwconv(gate_BNM.transpose(1, 2).unflatten(2, size))
            return self.fc2(F.gelu(map_BMYX).flatten(2).transpose(1, 2) * value_BNM)
        hidden_BNK = F.linear(hidden_BNC, self.fc1.weight)
        assert self.dwconv.bias is not None
        gated_BNM = convolutional_glu(
            hidden_BNK, self.fc1.bias, self.dwconv.weight.squeeze(1), self.dwconv.bias, size=size
        )
        return self.fc2(gated_BNM)


class Block(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and beside a residual path that stochastic depth may leave alone."""

    def __init__(self, config: MoHTransNeXtConfig, stage: int, drop_path_rate: float) -> None:
        super().__init__()
        width = config.hidden_sizes[stage]
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = make_attention(config, stage)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = ConvolutionalGLU(width, config.mlp_ratios[stage])
        self.drop_path_rate = drop_path_rate

    def forward(
        self, hidden_BNC: Tensor, size: Size, pooled: Size, positions: RelativePositions
    ) -> tuple[Tensor, Routing | None]:
        attended_BNC, routing = self.attention(self.norm1(hidden_BNC), size, pooled, positions)
        hidden_BNC = hidden_BNC + self.drop_path(attended_BNC)
        return hidden_BNC + self.drop_path(self.mlp(self.norm2(hidden_BNC), size)), routing

    def drop_path(self, branch_BNC: Tensor) -> Tensor:
        """In training: the whole branch of a sample becomes 0 at the given rate; the others grow to keep the mean."""
        if not self.training or self.drop_path_rate == 0.0:
            return branch_BNC
        kept_B11 = torch.empty_like(branch_BNC[:, :1, :1]).bernoulli_(1.0 - self.drop_path_rate)
        return branch_BNC * (kept_B11 / (1.0 - self.drop_path_rate))


class Stage(nn.Module):
    """A smaller map, the blocks on it, and a norm."""

    def __init__(self, config: MoHTransNeXtConfig, stage: int, drop_path_rates: Sequence[float]) -> None:
        super().__init__()
        width = config.hidden_sizes[stage]
        if stage == 0:
            self.embed = PatchEmbedding(config.num_channels, width, 2 * config.patch_size - 1, config.patch_size)
        else:
            self.embed = PatchEmbedding(config.hidden_sizes[stage - 1], width, 3, 2)
        self.blocks = nn.ModuleList(Block(config, stage, rate) for rate in drop_path_rates)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.pool_ratio = config.pool_ratios[stage]
        side = config.image_size // (config.patch_size * 2**stage)
        self.trained: Size = (side, side)

    def forward(self, map_BCYX: Tensor) -> tuple[Tensor, list[Routing]]:
        hidden_BNC, size = self.embed(map_BCYX)
        pooled = (max(size[0] // self.pool_ratio, 1), max(size[1] // self.pool_ratio, 1))
        positions = relative_positions(size, pooled, self.trained, hidden_BNC.device)
        routings = []
        for block in self.blocks:
            hidden_BNC, routing = block(hidden_BNC, size, pooled, positions)
            if routing is not None:
                routings.append(routing)
        return self.norm(hidden_BNC).transpose(1, 2).unflatten(2, size), routings


def make_attention(config: MoHTransNeXtConfig, stage: int) -> CosineAttention:
    """The attention module of one block."""
    width, heads = config.hidden_sizes[stage], config.num_heads[stage]
    router = None
    if config.shared_heads is not None and config.top_k is not None:
        kind = TwoStageRouter if config.two_stage else OneStageRouter
        router = kind(width, heads, config.shared_heads[stage], config.top_k[stage])
    if stage == config.num_stages - 1:
        return GlobalAttention(width, heads, router, config.qkv_bias)
    return AggregatedAttention(width, heads, router, config.window_size, config.qkv_bias)


class MoHTransNeXtPreTrainedModel(ReadableWeights, PreTrainedModel):
    """What transformers needs to know of these models."""

    config_class = MoHTransNeXtConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The published initialisation; the routers are linear layers like all others."""
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, CosineAttention):
            init.constant_(module.temperature, INITIAL_TEMPERATURE)
            init.trunc_normal_(module.query_embedding, std=0.02)
            if isinstance(module, AggregatedAttention):
                # A 1 x 1 convolution in the published code, and initialised as one.
                init.normal_(module.pool_proj.weight, std=math.sqrt(2.0 / module.pool_proj.out_features))
                init.trunc_normal_(module.local_bias, std=0.0004)
                init.trunc_normal_(module.learnable_tokens, std=0.02)
                init.zeros_(module.learnable_bias)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the published recipe trains without weight decay: also all biases and norms."""
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim == 1 or any(word in name for word in NO_WEIGHT_DECAY)
        }


class MoHTransNeXtModel(MoHTransNeXtPreTrainedModel):
    """The stages of a MoH-ViT, without a classifier."""

    def __init__(self, config: MoHTransNeXtConfig) -> None:
        super().__init__(config)
        rates = torch.linspace(0.0, config.drop_path_rate, config.num_hidden_layers, device="cpu").split(config.depths)
        self.stages = nn.ModuleList(Stage(config, stage, part.tolist()) for stage, part in enumerate(rates))
        for name, module in self.named_modules():
            if isinstance(module, CosineAttention):
                module.moh_name = name
        self.post_init()

    def forward(self, pixel_values: Tensor) -> tuple[tuple[Tensor, ...], tuple[Routing, ...]]:
        """The map after each stage, [B, C, Y, X], and the routing of every block that has gates.

        Args:
            pixel_values: [B, channels, height, width]; either side at least `config.smallest_side` pixels.

        Raises:
            MixheadError: where the images have another shape or are too small.
        """
        check_images(pixel_values, self.config)
        map_BCYX, maps, routings = pixel_values, [], []
        for stage in self.stages:
            map_BCYX, of_stage = stage(map_BCYX)
            maps.append(map_BCYX)
            routings += of_stage
        return tuple(maps), tuple(routings)


class MoHTransNeXtForImageClassification(MoHTransNeXtPreTrainedModel):
    """A MoH-ViT with a linear classifier on the mean of the last map."""

    def __init__(self, config: MoHTransNeXtConfig) -> None:
        super().__init__(config)
        self.vit = MoHTransNeXtModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_routing: bool = False,
        return_dict: bool | None = None,
    ) -> MoHTransNeXtOutput | tuple[Tensor, ...]:
        """Classifies images.

        Args:
            pixel_values: [B, channels, height, width], any size from `config.smallest_side` on, also not square.
            labels: class numbers [B], or a probability for every class [B, labels] (mixup, label smoothing).
            output_hidden_states: whether to return the maps of all stages.
            output_routing: whether to return the routing of every block.
            return_dict: False for a plain tuple.

        Raises:
            MixheadError: where the images have another shape or are too small.
        """
        maps, routings = self.vit(pixel_values)
        logits = self.classifier(maps[-1].flatten(2).mean(-1))
        balance = mean_balance_loss(routings) if self.training or output_routing else None
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, labels)
            if self.training and balance is not None:
                loss = loss + self.config.balance_coefficient * balance
        output = MoHTransNeXtOutput(
            loss=loss,
            logits=logits,
            balance_loss=balance,
            hidden_states=maps if output_hidden_states or self.config.output_hidden_states else None,
            routing=routings if output_routing else None,
        )
        wants_output = self.config.return_dict if return_dict is None else return_dict
        return output if wants_output else output.to_tuple()


def check_images(pixel_values: Tensor, config: MoHTransNeXtConfig) -> None:
    """Raises where a batch is none of images that the model can take."""
    if pixel_values.dim() != 4 or pixel_values.shape[1] != config.num_channels:
        raise MixheadError(
            f"pixel_values must be [batch, {config.num_channels}, height, width], got {list(pixel_values.shape)}."
        )
    height, width = pixel_values.shape[-2:]
    if min(height, width) < config.smallest_side:
        raise MixheadError(
            f"An image of {height} x {width} pixels is too small: either side must have at least "
            f"{config.smallest_side}. Resize it first."
        )


AutoModel.register(MoHTransNeXtConfig, MoHTransNeXtModel, exist_ok=True)
AutoModelForImageClassification.register(MoHTransNeXtConfig, MoHTransNeXtForImageClassification, exist_ok=True)
