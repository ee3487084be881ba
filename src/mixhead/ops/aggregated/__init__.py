"""Aggregated attention: a local window and pooled keys under one softmax."""

from mixhead.ops.aggregated.api import aggregated_attention, explain_aggregated
from mixhead.ops.aggregated.arguments import RelativeBias
from mixhead.ops.aggregated.engines import AGGREGATED_IMPLEMENTATIONS

__all__ = ["AGGREGATED_IMPLEMENTATIONS", "RelativeBias", "aggregated_attention", "explain_aggregated"]
