"""What calibration measures while a model runs: streamed sums, so that memory does not grow with the tokens.

Every class here is shown the input and all heads of the attention modules while the model runs with all heads
(`CalibrationTarget.observe`), and keeps sums only.

Shape legend: X real tokens of one call, C hidden size, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.models.hugging_face import AttentionSite


@dataclass
class LayerFit:
    """What has been fitted for one layer: the mean output of its heads and the scores of its router."""

    mean_HD: Tensor
    weight_HC: Tensor
    bias_H: Tensor
    mean_norm_H: Tensor


class Statistics:
    """Shown the input and all heads of every attention module of a dense run, it passes the real tokens to `see`."""

    def observe(self, name: str, hidden_BNC: Tensor, heads_BNHD: Tensor, token_mask_BN: Tensor | None) -> None:
        """Cuts out the real tokens and refuses NaN and infinity, which would spoil every sum."""
        hidden_XC, heads_XHD = hidden_BNC.flatten(0, 1), heads_BNHD.flatten(0, 1)
        if token_mask_BN is not None:
            keep_X = token_mask_BN.flatten()
            hidden_XC, heads_XHD = hidden_XC[keep_X], heads_XHD[keep_X]
        if not (torch.isfinite(hidden_XC).all() and torch.isfinite(heads_XHD).all()):
            raise MixheadError(
                f"{name} receives or computes NaN or infinity on the calibration text: check the model's weights and "
                "its dtype, for nothing can be fitted to such numbers."
            )
        with torch.autocast(hidden_XC.device.type, enabled=False):
            self.see(name, hidden_XC.float(), heads_XHD.float())

    def see(self, name: str, hidden_XC: Tensor, heads_XHD: Tensor) -> None:
        """Takes the real tokens of one module, float32."""
        raise NotImplementedError


class Means(Statistics):
    """Mean output of every head."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def see(self, name: str, hidden_XC: Tensor, heads_XHD: Tensor) -> None:
        """Adds up the heads' outputs."""
        self.sums[name] = self.sums.get(name, 0.0) + heads_XHD.double().sum(0)
        self.counts[name] = self.counts.get(name, 0) + heads_XHD.shape[0]

    def mean_HD(self, name: str) -> Tensor:
        """The mean, float32."""
        return (self.sums[name] / max(self.counts[name], 1)).float()


class ScoreSums(Statistics):
    """Sums for a ridge regression of each head's log contribution norm on the hidden states.

    The contribution of a head to a token is (H_i - mean of H_i) W_O^i: what the token loses where the mean stands in.
    """

    def __init__(self, sites: Sequence[AttentionSite], means: dict[str, Tensor]) -> None:
        self.means = means
        self.metrics_HDD = {site.name: output_metric_HDD(site) for site in sites}
        self.gram: dict[str, Tensor] = {}
        self.cross: dict[str, Tensor] = {}
        self.norms: dict[str, Tensor] = {}

    def see(self, name: str, hidden_XC: Tensor, heads_XHD: Tensor) -> None:
        """Adds the tokens to the normal equations."""
        centred_XHD = heads_XHD - self.means[name]
        square_XH = (torch.einsum("xhd,hde->xhe", centred_XHD, self.metrics_HDD[name]) * centred_XHD).sum(-1)
        square_XH = square_XH.clamp(min=torch.finfo(torch.float32).tiny)
        inputs_XC1 = torch.cat([hidden_XC, torch.ones_like(hidden_XC[:, :1])], 1)
        # The log makes the fit care for ratios between heads, which decide the choice, and not for a few loud tokens.
        add_to(self.gram, name, inputs_XC1.T @ inputs_XC1)
        add_to(self.cross, name, inputs_XC1.T @ (0.5 * square_XH.log()))
        add_to(self.norms, name, square_XH.sqrt().sum(0))

    def fit(self, name: str, ridge: float) -> LayerFit:
        """Solves the regression of one layer in float64; `ridge` is relative to the mean square of the inputs."""
        gram = self.gram[name]
        strength = ridge * gram.diagonal().mean()
        system = gram + strength * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        solution = torch.linalg.solve(system, self.cross[name])
        tokens = float(gram[-1, -1])
        return LayerFit(
            mean_HD=self.means[name],
            weight_HC=solution[:-1].T.float().contiguous(),
            bias_H=solution[-1].float(),
            mean_norm_H=(self.norms[name] / tokens).float(),
        )


class LossSums(Statistics):
    """Output energy that a layer loses when each token keeps only k heads, for several k at once.

    Attributes:
        lost: for every module, E |sum of the skipped heads' contributions|^2 summed over tokens, one entry per k.
        total: for every module, E |attention output|^2 summed over tokens (without the output bias).
    """

    def __init__(
        self,
        sites: Sequence[AttentionSite],
        counts: dict[str, list[int]],
        select: dict[str, Callable[[Tensor, int], Tensor]],
        means: dict[str, Tensor],
    ) -> None:
        self.weights_HDC = {site.name: site.output_weight_HDC().detach().float() for site in sites}
        self.counts, self.select, self.means = counts, select, means
        self.lost: dict[str, Tensor] = {}
        self.total: dict[str, Tensor] = {}

    def see(self, name: str, hidden_XC: Tensor, heads_XHD: Tensor) -> None:
        """Adds what each number of heads would lose."""
        weight_YC = self.weights_HDC[name].flatten(0, 1)
        centred_XHD = heads_XHD - self.means[name]
        lost = [
            ((~self.select[name](hidden_XC, k)).unsqueeze(-1) * centred_XHD).flatten(1) @ weight_YC
            for k in self.counts[name]
        ]
        add_to(self.lost, name, torch.stack([part_XC.square().sum() for part_XC in lost]))
        add_to(self.total, name, (heads_XHD.flatten(1) @ weight_YC).square().sum())


def output_metric_HDD(site: AttentionSite) -> Tensor:
    """W_O^i (W_O^i)^T of every head: the norm of a contribution without computing the contribution."""
    weight_HDC = site.output_weight_HDC().detach().float()
    with torch.autocast(weight_HDC.device.type, enabled=False):
        return weight_HDC @ weight_HDC.mT


def add_to(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Adds in float64."""
    sums[name] = sums[name] + value.double() if name in sums else value.double()
