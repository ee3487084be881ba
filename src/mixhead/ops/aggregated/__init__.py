"""Aggregated attention: a local window and pooled keys under one softmax."""

from mixhead.ops.aggregated.api import AGGREGATED_IMPLEMENTATIONS, aggregated_attention, explain_aggregated
from mixhead.ops.aggregated.arguments import RelativeBias

__all__ = ["AGGREGATED_IMPLEMENTATIONS", "RelativeBias", "aggregated_attention", "explain_aggregated"]
