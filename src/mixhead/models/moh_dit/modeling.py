"""MoH-DiT: a class-conditional diffusion transformer (DiT, arXiv 2212.09748) with mixture-of-head attention.

Shape legend: B batch, N tokens (patches), C hidden size, Y and X rows and columns of the input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixhead.errors import MixheadError
from mixhead.models.calibrated import trained_or_warned_of
from mixhead.models.moh_dit.configuration import MoHDiTConfig
from mixhead.nn import MixtureOfHeadAttention
from mixhead.plain import dtype_of
from mixhead.routing import Routing, router_kind

NORM_EPS = 1e-6
TIME_FREQUENCIES = 128
# Classifier-free guidance acts on these channels only, in the published sampler.
GUIDED_CHANNELS = 3


class TwoLayers(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, in_features: int, width: int, out_features: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, width)
        self.activation = activation
        self.fc2 = nn.Linear(width, out_features)

    def forward(self, states_BX: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(states_BX)))


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, config: MoHDiTConfig, layer: int) -> None:
        super().__init__()
        assert isinstance(config.head_dim, tuple)
        width, heads = config.hidden_size, config.layers[layer]
        self.attention = MixtureOfHeadAttention(
            width,
            heads.num_heads,
            heads.shared_heads,
            heads.top_k,
            head_dim=config.head_dim[layer],
            bias=config.qkv_bias,
            router=config.router if config.routes[layer] else None,
        )
        if config.routes[layer] and not router_kind(config.router).weighted:
            self.attention.reset_skipped()
        self.mlp = TwoLayers(width, config.mlp_size, width, nn.GELU(approximate="tanh"))
        self.modulation = nn.Linear(width, 6 * width)
        self.mlp_norm_eps = config.mlp_norm_eps

    def forward(self, hidden_BNC: Tensor, condition_BC: Tensor, impl: str = "auto") -> tuple[Tensor, Routing | None]:
        """Hidden states [B, N, C] and the attention's routing; the condition has passed SiLU."""
        parts_B1C = self.modulation(condition_BC).unsqueeze(1).chunk(6, dim=-1)
        shift_B1C, scale_B1C, gate_B1C, mlp_shift_B1C, mlp_scale_B1C, mlp_gate_B1C = parts_B1C
        attended_BNC, routing = self.attention(
            modulated_norm(hidden_BNC, shift_B1C, scale_B1C), return_routing=True, impl=impl
        )
        hidden_BNC = torch.addcmul(hidden_BNC, gate_B1C, attended_BNC)
        mlp_BNC = self.mlp(modulated_norm(hidden_BNC, mlp_shift_B1C, mlp_scale_B1C, self.mlp_norm_eps))
        return torch.addcmul(hidden_BNC, mlp_gate_B1C, mlp_BNC), routing


class FinalLayer(nn.Module):
    """A modulated norm and the map from a token to the pixels of its patch."""

    def __init__(self, config: MoHDiTConfig) -> None:
        super().__init__()
        self.modulation = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)

    def forward(self, hidden_BNC: Tensor, condition_BC: Tensor) -> Tensor:
        shift_B1C, scale_B1C = self.modulation(condition_BC).unsqueeze(1).chunk(2, dim=-1)
        return self.proj(modulated_norm(hidden_BNC, shift_B1C, scale_B1C))


class MoHDiT(nn.Module):
    """A diffusion transformer that predicts the noise in an image, or in its latents, of a class.

    Attributes:
        config: its sizes; replaced by another where the heads are changed.
        gradient_checkpointing: whether training computes the blocks again during backward instead of keeping their
            activations.
    """

    def __init__(self, config: MoHDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width, patch = config.hidden_size, config.patch_size
        self.patch_embed = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_tokens, width), requires_grad=False)
        self.time_embed = TwoLayers(2 * TIME_FREQUENCIES, width, width, nn.SiLU())
        self.class_embed = nn.Embedding(config.num_classes + config.null_class, width)
        self.blocks = nn.ModuleList(DiTBlock(config, layer) for layer in range(config.depth))
        self.final = FinalLayer(config)
        for name, attention in self.named_attention():
            attention.moh_name = name  # type: ignore[assignment]  # its routing is recorded under this name, inside a pipeline too
        self.register_load_state_dict_pre_hook(rename_former_weights)
        self.reset_parameters()

    def named_attention(self) -> Iterator[tuple[str, MixtureOfHeadAttention]]:
        """The attention modules and their names, in order."""
        for name, module in self.named_modules():
            if isinstance(module, MixtureOfHeadAttention):
                yield name, module

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initialisation: Xavier for linear layers, routers included; blocks begin as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for _, attention in self.named_attention():
            # Queries, keys and values are one matrix in the published code, which decides the range.
            bound = math.sqrt(6.0 / (self.config.hidden_size + 3 * attention.num_heads * attention.head_dim))
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj):
                nn.init.uniform_(proj.weight, -bound, bound)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.bias)  # type: ignore[arg-type]
        for weight in (self.class_embed.weight, self.time_embed.fc1.weight, self.time_embed.fc2.weight):
            nn.init.normal_(weight, std=0.02)
        modulations = [module.modulation for module in self.modules() if isinstance(module, DiTBlock | FinalLayer)]
        for layer in (*modulations, self.final.proj):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        side = self.config.sample_size // self.config.patch_size
        self.pos_embed.copy_(position_embedding(self.config.hidden_size, side))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        return_routing: bool = False,
        impl: str = "auto",
    ) -> Tensor | tuple[Tensor, tuple[Routing, ...]]:
        """Predicts the noise (and the variance, in the last channels).

        Args:
            x: noised images or latents [B, channels, sample_size, sample_size].
            t: time steps [B], or one for all.
            y: classes [B]; `num_classes` stands for none.
            return_routing: whether to return the routing of every block that routes, in order; the mean of their
                `balance_loss` (`mixhead.routing.mean_balance_loss`) belongs to the training loss.
            impl: the engine, see `mixhead.ops.head_attention`.

        Returns:
            [B, out_channels, sample_size, sample_size], or that and the routings.

        Raises:
            MixheadError: where a shape or a class does not fit the model.
        """
        self.check_inputs(x, t, y)
        if not self.config.calibrated and not torch.compiler.is_compiling():
            self.config = replace(self.config, calibrated=trained_or_warned_of(self, self.config.router))
        # Token by token in memory, or every norm would copy.
        hidden_BNC = self.patch_embed(x).flatten(2).transpose(1, 2).contiguous() + self.pos_embed
        condition_BC = F.silu(self.embed_time(t.expand(x.shape[0])) + self.class_embed(y))
        routings = []
        for block in self.blocks:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                hidden_BNC, routing = checkpoint(block, hidden_BNC, condition_BC, impl, use_reentrant=False)
            else:
                hidden_BNC, routing = block(hidden_BNC, condition_BC, impl)
            if routing is not None:
                routings.append(routing)
        output = self.unpatchify(self.final(hidden_BNC, condition_BC))
        return (output, tuple(routings)) if return_routing else output

    def routing_labels(self, x: Tensor, t: Tensor, y: Tensor, **_kwargs: object) -> dict[str, Tensor]:
        """The time step and the class of every sample, for `mixhead.record_routing`."""
        return {"time_step": t.expand(x.shape[0]), "class": y}

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Classifier-free guidance: the first half of the batch has its classes, the second half the null class.

        As in the published sampler both halves see the first half's `x`, and only the noise in the first three channels
        is guided. Both halves of the result are equal there.

        Args:
            x: [2B, channels, sample_size, sample_size].
            t: [2B], or one for all.
            y: [2B].
            cfg_scale: 1 is no guidance.
        """
        if x.shape[0] % 2:
            raise MixheadError(f"Guidance needs two equal halves in the batch, but x has {x.shape[0]} samples.")
        half = x[: x.shape[0] // 2]
        output = self(torch.cat([half, half]), t, y)
        noise, rest = output[:, :GUIDED_CHANNELS], output[:, GUIDED_CHANNELS:]
        return torch.cat([guided(noise, cfg_scale).repeat(2, 1, 1, 1), rest], dim=1)

    def embed_time(self, t_B: Tensor) -> Tensor:
        """[B, C]: cosines and sines of the time step, and two layers."""
        steps = torch.arange(TIME_FREQUENCIES, device=t_B.device, dtype=torch.float32)
        frequencies = torch.exp(-math.log(10_000) * steps / (TIME_FREQUENCIES - self.config.frequency_shift))
        angles_BF = t_B.float().unsqueeze(1) * frequencies
        waves_BF = torch.cat([angles_BF.cos(), angles_BF.sin()], dim=-1)
        return self.time_embed(waves_BF.to(dtype_of(self.time_embed)))

    def unpatchify(self, patches_BNX: Tensor) -> Tensor:
        """[B, N, patch * patch * channels] -> [B, channels, Y, X]."""
        side, patch = self.config.sample_size // self.config.patch_size, self.config.patch_size
        grid = patches_BNX.unflatten(1, (side, side)).unflatten(-1, (patch, patch, -1))
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(grid), -1, side * patch, side * patch)

    def check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        """Raises where a batch does not fit the model."""
        config = self.config
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise MixheadError(f"x must be [batch, {', '.join(map(str, expected))}], got {list(x.shape)}.")
        if t.shape not in ((), (1,), x.shape[:1]) or y.shape != x.shape[:1]:
            raise MixheadError(
                f"t and y must have one entry for each of the {len(x)} samples, got {list(t.shape)} and "
                f"{list(y.shape)}."
            )
        # Looking at the classes would make a GPU wait; there the embedding itself refuses what is out of range.
        if y.device.type == "cpu" and not torch.compiler.is_compiling() and len(y):
            check_classes((int(y.min()), int(y.max())), config)


def rename_former_weights(_module: nn.Module | None, state_dict: dict[str, Tensor], *_: object) -> None:
    """Names that checkpoints of the first version used become today's, in place."""
    for name in list(state_dict):
        new = name.replace(".moh_router.", ".router.").replace(".moh_skipped", ".skipped_HD")
        state_dict[new] = state_dict.pop(name)


def check_classes(classes: tuple[int, ...] | list[int], config: MoHDiTConfig) -> None:
    """Raises where a class number is none of the model's; the null class is one."""
    last = config.num_classes - 1 + config.null_class
    for label in classes:
        if not 0 <= label <= last:
            null = f" and {config.num_classes} for no class" if config.null_class else ""
            raise MixheadError(
                f"The class {label} is out of range: the model knows 0 to {config.num_classes - 1}{null}."
            )


def modulated_norm(hidden_BNC: Tensor, shift_B1C: Tensor, scale_B1C: Tensor, eps: float = NORM_EPS) -> Tensor:
    """Layer norm without weights, scaled and shifted per sample."""
    return torch.addcmul(shift_B1C, F.layer_norm(hidden_BNC, hidden_BNC.shape[-1:], eps=eps), 1 + scale_B1C)


def guided(noise: Tensor, scale: float) -> Tensor:
    """Noise of the first half of a batch, driven away from that of the second half."""
    conditional, unconditional = noise.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def position_embedding(width: int, side: int) -> Tensor:
    """[1, side * side, width]: sines and cosines of the column in the first half of the channels, then of the row."""
    frequencies = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64).unsqueeze(1) * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = waves.expand(side, -1, -1), waves.unsqueeze(1).expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float().unsqueeze(0)
