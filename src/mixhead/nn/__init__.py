"""Attention layers: plain modules to put into any model."""

from mixhead.nn.moh import KeyValueCache, MixtureOfHeadAttention, make_router, project_output, project_queries

__all__ = ["KeyValueCache", "MixtureOfHeadAttention", "make_router", "project_output", "project_queries"]
