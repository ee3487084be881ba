"""The layers of MoA models and of their dense baselines: post-LN, as in the published recipe.

Shape legend: B batch, N tokens of the queries, T tokens of the keys, C hidden size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from mixhead.models.moa.attention import Attention, Rotary, SelfCache, SourceCache, make_attention
from mixhead.models.moa.configuration import MoAConfig
from mixhead.routing import ExpertRouting


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, config: MoAConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = config.activation_dropout

    def forward(self, hidden_BNC: Tensor) -> Tensor:
        return self.fc2(F.dropout(F.relu(self.fc1(hidden_BNC)), self.dropout, self.training))


class Residual(nn.Module):
    """norm(x + dropout(branch)): the end of every part of a layer."""

    def __init__(self, config: MoAConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.dropout

    def forward(self, hidden_BNC: Tensor, branch_BNC: Tensor) -> Tensor:
        return self.norm(hidden_BNC + F.dropout(branch_BNC, self.dropout, self.training))


class EncoderLayer(GradientCheckpointingLayer):
    """Self-attention and a feed-forward layer."""

    def __init__(self, config: MoAConfig) -> None:
        super().__init__()
        self.self_attention: Attention = make_attention(config)
        self.self_attention_end = Residual(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_end = Residual(config)

    def forward(
        self,
        hidden_BNC: Tensor,
        token_mask_BN: Tensor | None,
        position_embeddings: Rotary | None = None,
    ) -> tuple[Tensor, list[ExpertRouting]]:
        """The next hidden states and the routing, where there is one."""
        attended_BNC, routing = self.self_attention(
            hidden_BNC,
            hidden_BNC,
            query_mask_BN=token_mask_BN,
            key_mask_BT=token_mask_BN,
            position_embeddings=position_embeddings,
        )
        hidden_BNC = self.self_attention_end(hidden_BNC, attended_BNC)
        hidden_BNC = self.feed_forward_end(hidden_BNC, self.feed_forward(hidden_BNC))
        return hidden_BNC, [] if routing is None else [routing]


class DecoderLayer(GradientCheckpointingLayer):
    """Causal self-attention, attention to the encoder, and a feed-forward layer."""

    def __init__(self, config: MoAConfig, layer_index: int) -> None:
        super().__init__()
        self.self_attention: Attention = make_attention(config)
        self.self_attention_end = Residual(config)
        self.cross_attention: Attention = make_attention(config)
        self.cross_attention_end = Residual(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_end = Residual(config)
        self.layer_index = layer_index

    def forward(
        self,
        hidden_BNC: Tensor,
        encoded_BTC: Tensor,
        query_mask_BN: Tensor | None,
        key_mask_BN: Tensor | None,
        encoded_mask_BT: Tensor | None,
        cache: EncoderDecoderCache | None = None,
    ) -> tuple[Tensor, list[ExpertRouting]]:
        """The next hidden states, and the routings of self- and cross-attention where there are any.

        Args:
            hidden_BNC: hidden states of the tokens that are new.
            encoded_BTC: output of the encoder.
            query_mask_BN: False at padding among the new tokens; it does not count in the routing.
            key_mask_BN: False at padding among all tokens, those in the cache first.
            encoded_mask_BT: False at padding of the source.
            cache: keys and values of earlier tokens and of the source.
        """
        attended_BNC, own = self.self_attention(
            hidden_BNC,
            hidden_BNC,
            query_mask_BN=query_mask_BN,
            key_mask_BT=key_mask_BN,
            causal=True,
            cache=None if cache is None else SelfCache(cache, self.layer_index),
        )
        hidden_BNC = self.self_attention_end(hidden_BNC, attended_BNC)
        attended_BNC, cross = self.cross_attention(
            hidden_BNC,
            encoded_BTC,
            query_mask_BN=query_mask_BN,
            key_mask_BT=encoded_mask_BT,
            cache=None if cache is None else SourceCache(cache, self.layer_index),
        )
        hidden_BNC = self.cross_attention_end(hidden_BNC, attended_BNC)
        hidden_BNC = self.feed_forward_end(hidden_BNC, self.feed_forward(hidden_BNC))
        return hidden_BNC, [routing for routing in (own, cross) if routing is not None]


class Embeddings(nn.Module):
    """Token embeddings times sqrt(C), plus sinusoidal positions of any length unless attention knows positions."""

    def __init__(self, config: MoAConfig, tokens: nn.Embedding) -> None:
        super().__init__()
        self.tokens = tokens
        self.dropout = config.dropout
        self.sinusoidal = not config.rotary

    def forward(self, ids_BN: Tensor, first_position: int = 0) -> Tensor:
        hidden_BNC = self.tokens(ids_BN)
        hidden_BNC = hidden_BNC * hidden_BNC.shape[-1] ** 0.5
        if self.sinusoidal:
            hidden_BNC = hidden_BNC + sinusoids(first_position, ids_BN.shape[1], hidden_BNC.shape[-1], hidden_BNC)
        return F.dropout(hidden_BNC, self.dropout, self.training)


def sinusoids(first: int, count: int, width: int, like: Tensor) -> Tensor:
    """Sines in the first half of the columns, cosines in the second (arXiv 1706.03762, section 3.5): [count, width]."""
    place_N1 = torch.arange(first, first + count, device=like.device, dtype=torch.float32).unsqueeze(1)
    half = torch.arange(width // 2, device=like.device, dtype=torch.float32)
    angle_NX = place_N1 * torch.exp(half * (-math.log(10000.0) / max(width // 2 - 1, 1)))
    return torch.cat([angle_NX.sin(), angle_NX.cos()], 1).to(like.dtype)


def rotary(count: int, head_dim: int, theta: float, like: Tensor) -> Rotary:
    """Cosines and sines of the angles by which places turn pairs of channels (arXiv 2104.09864, eq. 15)."""
    place_N1 = torch.arange(count, device=like.device, dtype=torch.float32).unsqueeze(1)
    pair_X = torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32)
    angle_1NX = (place_N1 * theta ** (-pair_X / head_dim)).unsqueeze(0)
    angle_1ND = torch.cat([angle_1NX, angle_1NX], -1)
    return angle_1ND.cos().to(like.dtype), angle_1ND.sin().to(like.dtype)
