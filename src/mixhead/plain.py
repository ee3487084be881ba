"""Whether the weights of a layer may be read: in any other case only the layer knows how it computes, and is called."""

from __future__ import annotations

from torch import Tensor, nn


def is_plain(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a layer of one of these types is its weight and bias and nothing more.

    No adapter, no quantised weight, no hook, and no `forward` of its own, as accelerate gives to layers whose weights
    are offloaded.
    """
    return (
        type(layer) in kinds
        and type(layer.weight) in (nn.Parameter, Tensor)
        and "forward" not in vars(layer)
        and not (layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks)
    )
