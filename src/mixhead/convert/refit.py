"""Output projections fitted to the heads that are left.

Where a token skips heads, what they would have said can often be read off the heads that it keeps. Least squares finds
the output projection W' that does so best over the calibration tokens:

    minimise  sum over tokens |z W' + b' - y|^2  +  ridge |W' - W_O|^2

with y the attention output of all heads through the original W_O, and z the heads' outputs, a skipped head's being its
mean (what the converted model computes). One pass, no gradient, and the model does no more work per token than before.

Shape legend: X real tokens of one call, C hidden size, H heads, D head dim, Y = H * D, Z = Y + 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from mixhead.convert.statistics import Statistics, add_to
from mixhead.convert.target import RoutingParts
from mixhead.models.hugging_face import AttentionSite


class OutputSums(Statistics):
    """Sums for that fit.

    Args:
        routing: the modules at which tokens skip heads, and the router and constants of each.
    """

    def __init__(self, routing: Mapping[AttentionSite, RoutingParts]) -> None:
        self.routing = {site.name: parts for site, parts in routing.items()}
        self.weights_YC = {site.name: site.output_weight_YC().detach().float() for site in routing}
        self.gram: dict[str, Tensor] = {}
        self.cross: dict[str, Tensor] = {}
        self.energy: dict[str, Tensor] = {}

    def see(self, name: str, hidden_XC: Tensor, heads_XHD: Tensor) -> None:
        """Adds the tokens to the normal equations."""
        if name not in self.routing:
            return
        parts = self.routing[name]
        selected_XH = parts.router(hidden_XC[None], None, None).selected_BNH[0]
        filled_XHD = torch.where(selected_XH.unsqueeze(-1), heads_XHD, parts.skipped_HD.float())
        inputs_XZ = torch.cat([filled_XHD.flatten(1), filled_XHD.new_ones(len(filled_XHD), 1)], 1)
        output_XC = heads_XHD.flatten(1) @ self.weights_YC[name]
        add_to(self.gram, name, inputs_XZ.T @ inputs_XZ)
        add_to(self.cross, name, inputs_XZ.T @ output_XC)
        add_to(self.energy, name, output_XC.square().sum())

    @torch.no_grad()
    def refit(self, site: AttentionSite, ridge: float) -> float:
        """Writes the fitted projection into the layer; returns the share of the output's energy that is still lost.

        `ridge` is relative to the mean square of the inputs. A projection without bias gets none.
        """
        energy = self.energy[site.name]
        if energy == 0:  # A layer of zeros, as pruning leaves: nothing to fit, and nothing is lost.
            return 0.0
        weight_YC, bias_C = site.output_weight_YC(), cast(Any, site.output_projection).bias
        size = weight_YC.shape[0] + (bias_C is not None)
        gram, cross = self.gram[site.name][:size, :size], self.cross[site.name][:size]
        now = torch.zeros_like(cross)
        now[: weight_YC.shape[0]] = weight_YC.double()
        strength = ridge * gram.diagonal()[: weight_YC.shape[0]].mean()
        system = gram + strength * torch.eye(size, dtype=gram.dtype, device=gram.device)
        fitted = now + torch.linalg.solve(system, cross - gram @ now)
        weight_YC.copy_(fitted[: weight_YC.shape[0]])
        if bias_C is not None:
            bias_C.add_(fitted[-1].to(bias_C.dtype))
        lost = energy - 2 * (fitted * cross).sum() + (fitted * (gram @ fitted)).sum()
        return float((lost / energy).clamp(min=0.0))
