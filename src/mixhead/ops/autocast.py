"""What autocast does to the arguments of an operator."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast all in its dtype, as scaled_dot_product_attention takes them; without it they stay as they are.

    A rotary embedding may have brought queries and keys back to float32 where the values are in half precision.
    """
    device_type = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)
