"""The two kinds of attention that MoA models are built with: attention experts, and plain heads for the baselines.

Both have the same signature, no biases, and keep their keys and values in the caches of transformers.

Shape legend: B batch, N queries, T keys, C hidden size, H heads, D head dim, X = H D.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from mixhead.models.moa.configuration import MoAConfig
from mixhead.nn import MixtureOfAttentionHeads
from mixhead.nn.moa import rotate
from mixhead.ops.masks import with_causal
from mixhead.routing import ExpertRouting, LossWeights

KeysValues = tuple[Tensor, Tensor]
Rotary = tuple[Tensor, Tensor]  # cos and sin, [1, N, D] each


class LayerCache(Protocol):
    """Where one attention module keeps its keys and values between calls."""

    def keys_values(self, project: Callable[[], KeysValues]) -> KeysValues:
        """All keys and values to attend to; `project` computes those of this call, if they are needed."""
        ...


class SelfCache:
    """The keys and values of all tokens so far: those of this call are appended."""

    def __init__(self, cache: EncoderDecoderCache, layer: int) -> None:
        self.cache, self.layer = cache.self_attention_cache, layer

    def keys_values(self, project: Callable[[], KeysValues]) -> KeysValues:
        return self.cache.update(*project(), self.layer)


class SourceCache:
    """The keys and values of the encoder's output: computed in the first call."""

    def __init__(self, cache: EncoderDecoderCache, layer: int) -> None:
        self.cache, self.layer = cache, layer

    def keys_values(self, project: Callable[[], KeysValues]) -> KeysValues:
        if self.cache.is_updated.get(self.layer):
            kept = self.cache.cross_attention_cache.layers[self.layer]
            return kept.keys, kept.values
        self.cache.is_updated[self.layer] = True
        return self.cache.cross_attention_cache.update(*project(), self.layer)


class Attention(nn.Module, ABC):
    """What a layer calls: attends from `hidden_BNC` to `source_BTC`. A kind of attention says how, in two steps."""

    def forward(
        self,
        hidden_BNC: Tensor,
        source_BTC: Tensor,
        *,
        query_mask_BN: Tensor | None = None,
        key_mask_BT: Tensor | None = None,
        causal: bool = False,
        cache: LayerCache | None = None,
        position_embeddings: Rotary | None = None,
    ) -> tuple[Tensor, ExpertRouting | None]:
        """The output [B, N, C] and the routing of a module that has one.

        Args:
            hidden_BNC: hidden states of the queries.
            source_BTC: hidden states of the keys and values; not read where a cache holds them.
            query_mask_BN: bool, False at padding, which does not count in the routing.
            key_mask_BT: bool, False at padding, which is not attended to.
            causal: a query sees the keys up to its own position; the last query sees the last key.
            cache: keeps keys and values.
            position_embeddings: turns queries and keys, which are those of the same tokens; not with a cache.
        """
        project = partial(self.project, source_BTC)
        keys_values = project() if cache is None else cache.keys_values(project)
        return self.attend(hidden_BNC, keys_values, query_mask_BN, key_mask_BT, causal, position_embeddings)

    @abstractmethod
    def project(self, source_BTC: Tensor) -> KeysValues:
        """Keys and values of the source, [B, heads, T, D] each."""

    @abstractmethod
    def attend(
        self,
        hidden_BNC: Tensor,
        keys_values: KeysValues,
        query_mask_BN: Tensor | None,
        key_mask_BT: Tensor | None,
        causal: bool,
        position_embeddings: Rotary | None,
    ) -> tuple[Tensor, ExpertRouting | None]:
        """As `forward`, to keys and values that are there already."""


class DenseAttention(Attention):
    """Multi-head attention (arXiv 1706.03762, section 3.2.2) with any width of the heads."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        width = num_heads * head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden_size, width, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(width, hidden_size, bias=False)

    def project(self, source_BTC: Tensor) -> KeysValues:
        return self._split_heads(self.k_proj(source_BTC)), self._split_heads(self.v_proj(source_BTC))

    def attend(
        self,
        hidden_BNC: Tensor,
        keys_values: KeysValues,
        query_mask_BN: Tensor | None,
        key_mask_BT: Tensor | None,
        causal: bool,
        position_embeddings: Rotary | None,
    ) -> tuple[Tensor, None]:
        del query_mask_BN
        k_BHTD, v_BHTD = keys_values
        q_BHND = self._split_heads(self.q_proj(hidden_BNC))
        if position_embeddings is not None:
            q_BHND, k_BHTD = rotate(q_BHND, *position_embeddings), rotate(k_BHTD, *position_embeddings)
        queries, keys = q_BHND.shape[2], k_BHTD.shape[2]
        mask = None if key_mask_BT is None else key_mask_BT[:, None, None, :]
        causal = causal and queries > 1
        if causal and (mask is not None or queries != keys):
            mask, causal = with_causal(mask, queries, keys, q_BHND.device), False
        dropout = self.dropout if self.training else 0.0
        out_BHND = F.scaled_dot_product_attention(
            q_BHND, k_BHTD, v_BHTD, attn_mask=mask, dropout_p=dropout, is_causal=causal
        )
        return self.o_proj(out_BHND.transpose(1, 2).flatten(2)), None

    def _split_heads(self, states_BNX: Tensor) -> Tensor:
        return states_BNX.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class ExpertAttention(Attention):
    """Mixture of attention heads; see `mixhead.nn.MixtureOfAttentionHeads`."""

    def __init__(self, experts: MixtureOfAttentionHeads) -> None:
        super().__init__()
        self.experts = experts

    def project(self, source_BTC: Tensor) -> KeysValues:
        return self.experts.project_keys_and_values(source_BTC)

    def attend(
        self,
        hidden_BNC: Tensor,
        keys_values: KeysValues,
        query_mask_BN: Tensor | None,
        key_mask_BT: Tensor | None,
        causal: bool,
        position_embeddings: Rotary | None,
    ) -> tuple[Tensor, ExpertRouting]:
        return self.experts(
            hidden_BNC,
            query_padding_mask=None if query_mask_BN is None else ~query_mask_BN,
            key_padding_mask=None if key_mask_BT is None else ~key_mask_BT,
            causal=causal,
            keys_and_values=keys_values,
            position_embeddings=position_embeddings,
        )


def make_attention(config: MoAConfig) -> Attention:
    """The attention module that a configuration asks for."""
    if config.active_heads is None:
        return DenseAttention(config.hidden_size, config.num_heads, config.head_dim, config.attention_dropout)
    experts = MixtureOfAttentionHeads(
        config.hidden_size,
        config.num_heads,
        config.active_heads,
        config.head_dim,
        num_key_value_heads=config.num_key_value_heads,
        normalisation=config.normalisation,
        noisy=config.noisy,
        sample_k=config.sample_k,
        loss_weights=LossWeights(config.switch_weight, config.z_weight, config.cv_weight),
        dropout=config.attention_dropout,
    )
    return ExpertAttention(experts)
