"""Whether the weights of a layer may be read, and where it computes whatever holds its weights.

In any other case only the layer knows how it computes, and is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

COMPUTES_IN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


def dtype_of(*layers: nn.Module) -> torch.dtype:
    """What the first layer computes in; where all its weights are quantised, what the next does."""
    weights = (weight for layer in layers for weight in (*layer.parameters(), *layer.buffers()))
    return next((weight.dtype for weight in weights if weight.dtype in COMPUTES_IN), torch.float32)


def place_of(layer: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a layer computes and in which dtype."""
    weights = [*layer.parameters(), *layer.buffers()]
    floating = dtype_of(layer, model)
    for part in layer.modules():
        for hook in offloading_hooks(part):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device), floating
    return next((w.device for w in (*weights, *model.parameters())), torch.device("cpu")), floating


def offloading_hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks of a module, which bring its own weights while it runs."""
    hook = getattr(module, "_hf_hook", None)
    return [each for each in getattr(hook, "hooks", (hook,)) if each is not None]
