"""Attention layers: plain modules to put into any model."""

from mixhead.nn.moa import MixtureOfAttentionHeads, slot_attention
from mixhead.nn.moh import KeyValueCache, MixtureOfHeadAttention, project_output, project_queries

__all__ = [
    "KeyValueCache",
    "MixtureOfAttentionHeads",
    "MixtureOfHeadAttention",
    "project_output",
    "project_queries",
    "slot_attention",
]
