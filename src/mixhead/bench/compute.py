"""What a forward pass costs: multiply-accumulates, counted while it runs."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel


def forward_macs(model: PreTrainedModel, **inputs: Tensor) -> int:
    """Multiply-accumulates of all matrix products of one forward pass in evaluation mode.

    Counted as they are executed, so that an expert counts for the tokens that chose it. The pass runs on a copy in
    float64, where no kernel of ours takes the place of matrix products that can be counted; causal attention counts
    with all its scores.
    """
    counted = copy.deepcopy(model).double().eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        counted(**inputs)
    return counter.get_total_flops() // 2
