"""`calibrate`: fits the routers of a converted model without a gradient, from streamed statistics.

1. A few batches give every head's mean output: what will stand in for the head where a token skips it.
2. All batches give, for every layer, a ridge regression of each head's log contribution norm on the hidden states: the
   router's scores. Heads with the largest mean contribution become the shared ones.
3. A few batches give what each layer loses at every number of heads, and one batch how much the model's output changes
   when that layer alone is routed. From both, heads are shared out among the layers: one goes where it is missed least.
4. All batches give, for every layer, the output projection that makes the most of the heads that are left.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixhead.convert.batches import Batch, checked_batches
from mixhead.convert.budget import share_out
from mixhead.convert.refit import OutputSums
from mixhead.convert.statistics import LayerFit, LossSums, Means, ScoreSums, Statistics
from mixhead.convert.target import CalibrationTarget, marked_calibrated, target_of
from mixhead.errors import MixheadError
from mixhead.models.hugging_face import AttentionSite
from mixhead.modes import autocast_to, evaluation_mode
from mixhead.routing import LayerHeads, grouped_top_k_mask

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class CalibrationConfig:
    """How to calibrate.

    Attributes:
        budget: "sensitivity" shares the heads out among the layers by what they are worth there; "uniform" leaves every
            layer as configured.
        dense_layers: so many first layers keep all heads under the sensitivity budget, as far as the others can make up
            for it: they see little more than the bare token, and a router fitted there does not carry over to tokens
            that the calibration text lacks.
        least_share: no layer gets fewer heads than this share of its own.
        pilot_batches: batches for the means and for the loss at each number of heads.
        probe_sequences: sequences for the sensitivity of each layer (one forward pass per layer), off the last batch.
        ridge: strength of the regression's ridge, relative to the mean square of the hidden states.
        refit_output: whether the output projections are fitted to the heads that are left (least squares, towards what
            all heads gave). This changes weights of the original model; False keeps every one of them; those that are
            quantised, adapted, offloaded, or fed with gated heads are kept in any case.
        output_ridge: strength of the ridge that holds them near the original ones, relative to the mean square of the
            heads' outputs.
        autocast: dtype of the forward passes, for example torch.bfloat16; None computes in the model's own.
    """

    budget: str = "sensitivity"
    dense_layers: int = 1
    least_share: float = 1 / 3
    pilot_batches: int = 2
    probe_sequences: int = 1
    ridge: float = 1e-3
    refit_output: bool = True
    output_ridge: float = 0.1
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.budget not in ("sensitivity", "uniform"):
            raise MixheadError(f"budget={self.budget!r} is unknown: choose sensitivity or uniform.")
        if min(self.pilot_batches, self.probe_sequences) < 1 or self.dense_layers < 0:
            raise MixheadError("pilot_batches and probe_sequences must be at least 1, and dense_layers at least 0.")
        if not 0.0 <= self.least_share <= 1.0:
            raise MixheadError(f"least_share={self.least_share} must lie between 0 and 1.")
        for name in ("ridge", "output_ridge"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise MixheadError(f"{name}={getattr(self, name)} must be a positive number.")


@dataclass(frozen=True)
class LayerReport:
    """What calibration chose for one layer and expects of it.

    Attributes:
        name: path of the attention module.
        num_heads: H.
        active_heads: heads that a token uses.
        shared_heads: indices of the heads that every token uses.
        expected_loss: share of the attention output's energy that is lost with the skipped heads.
        sensitivity: how far the model's output moves when this layer alone is routed at the probe's number of heads
            (mean KL divergence in nats, or relative squared error for models without logits); NaN if not measured.
    """

    name: str
    num_heads: int
    active_heads: int
    shared_heads: tuple[int, ...]
    expected_loss: float
    sensitivity: float


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration chose, layer by layer.

    Attributes:
        layers: one entry per attention layer.
        tokens: real tokens that the routers were fitted on.
    """

    layers: tuple[LayerReport, ...]
    tokens: int

    @property
    def active_share(self) -> float:
        """Share of all heads that a token uses."""
        return sum(layer.active_heads for layer in self.layers) / sum(layer.num_heads for layer in self.layers)

    def to_rich(self) -> Any:
        """A table for the terminal."""
        from rich.table import Table

        title = f"Calibrated on {self.tokens:,} tokens: {self.active_share:.1%} of all heads per token"
        table = Table(title=title, title_justify="left")
        for column in ("layer", "heads", "shared", "expected loss", "sensitivity"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for layer in self.layers:
            table.add_row(
                layer.name,
                f"{layer.active_heads} of {layer.num_heads}",
                " ".join(map(str, layer.shared_heads)) or "—",
                f"{layer.expected_loss:.2%}",
                "—" if math.isnan(layer.sensitivity) else f"{layer.sensitivity:.4f}",
            )
        return table


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    config: CalibrationConfig | None = None,
    on_progress: OnProgress | None = None,
) -> CalibrationReport:
    """Chooses shared heads, fits the linear routers and shares the heads out among the layers. No gradients.

    The number of active heads over all layers stays as configured. Memory does not grow with the number of tokens.

    Args:
        model: converted by `mixhead.convert` with the "linear" router; changed in place.
        batches: what the model is to be fitted to: tensors of its main input, as token ids [B, N] or pixel values
            [B, C, Y, X]; or mappings of its keyword arguments (for a DiT those of `noised_batches`).
            Padding (by `attention_mask`) does not count. They are kept in a list, since they are
            gone through more than once.
        config: how; the defaults suit a language model.
        on_progress: called with (steps done, all steps).

    Raises:
        MixheadError: where the model has no linear routers, or batches are missing, do not fit it, or give NaN.
    """
    config = CalibrationConfig() if config is None else config
    target = target_of(model)
    kept = checked_batches(model, batches)
    with marked_calibrated(target):
        return Calibration(target, kept, config, on_progress).run()


class Calibration:
    """The steps of one calibration, and the values that they hand on."""

    def __init__(
        self,
        target: CalibrationTarget,
        batches: list[dict[str, Any]],
        config: CalibrationConfig,
        on_progress: OnProgress | None,
    ) -> None:
        self.target, self.config = target, config
        self.batches = batches
        self.model, self.sites, self.heads, self.groups = target.model, target.sites, target.heads, target.groups
        self.pilots = self.batches[: config.pilot_batches]
        self.probe_batch = first_samples(self.batches[-1], config.probe_sequences)
        skips = not all(heads.is_dense for heads in self.heads)
        self.by_sensitivity = skips and config.budget == "sensitivity"  # layers may get different numbers of heads
        self.refits = skips and config.refit_output
        self.tokens_seen = 0
        self.on_progress = on_progress
        self.done, self.steps = 0, self.forward_passes()

    def forward_passes(self) -> int:
        """How often the model will run."""
        passes = 2 * len(self.pilots) + len(self.batches)
        if self.by_sensitivity:
            passes += 1 + sum(not heads.is_dense for heads in self.probe_heads())
        if self.refits:
            passes += len(self.batches)
        return passes

    def run(self) -> CalibrationReport:
        """All steps."""
        autocast = autocast_to(self.config.autocast, self.sites[0].device)
        with evaluation_mode(self.model), torch.no_grad(), autocast:
            fits = self.fit_scores(self.measure_means())
            shared = {site.name: self.choose_shared(i, fits[site.name]) for i, site in enumerate(self.sites)}
            counts = {site.name: self.candidate_counts(i) for i, site in enumerate(self.sites)}
            losses, totals = self.measure_losses(fits, shared, counts)
            totals = {name: total or 1.0 for name, total in totals.items()}  # a layer of zeros loses nothing
            sensitivity: dict[str, float] = {}
            if self.by_sensitivity:
                sensitivity = self.probe(fits, shared)
                self.heads = self.budget(counts, losses, sensitivity)
            self.install(self.heads, fits, shared)
            if self.refits:
                for name, lost in self.refit_outputs().items():
                    losses[name] = dict.fromkeys(losses[name], lost * totals[name])
        for site in self.sites:
            site.module.train(site.module.training)  # new routers take on the mode that is in force again
        return CalibrationReport(
            tuple(
                LayerReport(
                    name=site.name,
                    num_heads=heads.num_heads,
                    active_heads=heads.active_heads,
                    shared_heads=tuple(shared[site.name].nonzero().flatten().tolist()) if not heads.is_dense else (),
                    expected_loss=0.0 if heads.is_dense else losses[site.name][heads.active_heads] / totals[site.name],
                    sensitivity=sensitivity.get(site.name, math.nan),
                )
                for site, heads in zip(self.sites, self.heads, strict=True)
            ),
            self.tokens_seen,
        )

    def measure_means(self) -> dict[str, Tensor]:
        """Step 1."""
        statistics = Means()
        self.observe(self.pilots, statistics)
        self.require_all(statistics.sums)
        return {site.name: statistics.mean_HD(site.name) for site in self.sites}

    def fit_scores(self, means: dict[str, Tensor]) -> dict[str, LayerFit]:
        """Step 2: the router of every layer."""
        statistics = ScoreSums(self.sites, means)
        self.observe(self.batches, statistics)
        self.tokens_seen = int(next(iter(statistics.gram.values()))[-1, -1])
        return {site.name: statistics.fit(site.name, self.config.ridge) for site in self.sites}

    def choose_shared(self, index: int, fit: LayerFit) -> Tensor:
        """Step 2: the heads with the largest mean contribution, equally many in every group: bool [H]."""
        count = self.heads[index].shared_heads
        return grouped_top_k_mask(fit.mean_norm_H[None, None], count, self.groups[index])[0, 0]

    def candidate_counts(self, index: int) -> list[int]:
        """Numbers of active heads below all of them that the layer could get."""
        heads, step = self.heads[index], self.groups[index]
        least = max(heads.shared_heads, step, step * math.ceil(self.config.least_share * heads.num_heads / step))
        counts = {*range(min(least, heads.active_heads), heads.num_heads, step), heads.active_heads}
        return sorted(counts - {heads.num_heads})

    def measure_losses(
        self, fits: dict[str, LayerFit], shared: dict[str, Tensor], counts: dict[str, list[int]]
    ) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
        """Step 3: energy lost at every number of heads, and the whole energy, of every layer."""

        def selector(name: str, groups: int) -> Callable[[Tensor, int], Tensor]:
            def select(hidden_XC: Tensor, k: int) -> Tensor:
                scores_XH = hidden_XC @ fits[name].weight_HC.T + fits[name].bias_H
                return grouped_top_k_mask(scores_XH.masked_fill(shared[name], torch.inf), k, groups)

            return select

        select = {site.name: selector(site.name, groups) for site, groups in zip(self.sites, self.groups, strict=True)}
        sums = LossSums(self.sites, counts, select, {name: fit.mean_HD for name, fit in fits.items()})
        self.observe(self.pilots, sums)
        losses = {name: dict(zip(counts[name], lost.tolist(), strict=True)) for name, lost in sums.lost.items()}
        return losses, {name: float(total) for name, total in sums.total.items()}

    def probe(self, fits: dict[str, LayerFit], shared: dict[str, Tensor]) -> dict[str, float]:
        """Step 3: how far the output moves when one layer alone is routed, as in the configured budget."""
        self.install(self.probe_heads(), fits, shared)
        routed = [site.name for site, heads in zip(self.sites, self.probe_heads(), strict=True) if not heads.is_dense]
        dense = comparable_output(self.run_model(self.probe_batch, None))
        return {name: divergence(dense, comparable_output(self.run_model(self.probe_batch, name))) for name in routed}

    def probe_heads(self) -> list[LayerHeads]:
        """The heads at which layers are probed: two thirds of them, a number at which a difference shows."""
        probed = []
        for index, heads in enumerate(self.heads):
            step = self.groups[index]
            k = max(step * round(heads.num_heads * 2 / 3 / step), heads.shared_heads, step)
            probed.append(LayerHeads(heads.num_heads, min(k, heads.num_heads), heads.shared_heads))
        return probed

    def budget(
        self, counts: dict[str, list[int]], losses: dict[str, dict[int, float]], sensitivity: dict[str, float]
    ) -> list[LayerHeads]:
        """Step 3: as many active heads as configured, shared out among the layers."""
        costs = []
        for site, heads, probed in zip(self.sites, self.heads, self.probe_heads(), strict=True):
            reference = losses[site.name].get(probed.active_heads, 0.0)
            scale = sensitivity.get(site.name, 0.0) / reference if reference > 0.0 else math.nan
            routed = {k: scale * losses[site.name][k] for k in counts[site.name] if scale >= 0.0}
            costs.append({heads.num_heads: 0.0, **routed})
        total = sum(heads.active_heads for heads in self.heads)
        chosen = share_out(costs, total, self.config.dense_layers)
        if sum(chosen) > total:
            logger.info("No shares of single layers add up to %d heads: every layer keeps its configured ones.", total)
            return self.heads
        return [
            LayerHeads(heads.num_heads, active, min(heads.shared_heads, active))
            for heads, active in zip(self.heads, chosen, strict=True)
        ]

    def install(self, layers: Sequence[LayerHeads], fits: dict[str, LayerFit], shared: dict[str, Tensor]) -> None:
        """Writes what was fitted into the model."""
        for index, (site, heads) in enumerate(zip(self.sites, layers, strict=True)):
            self.target.set_heads(index, heads)
            if heads.is_dense:
                continue
            fit, parts = fits[site.name], self.target.routing_of(site)
            with torch.no_grad():
                parts.router.score_proj.weight.copy_(fit.weight_HC)
                parts.router.score_proj.bias.copy_(fit.bias_H)
                parts.router.shared_H.copy_(shared[site.name])
                parts.skipped_HD.copy_(fit.mean_HD)

    def refit_outputs(self) -> dict[str, float]:
        """Step 4; returns the share of the output's energy that is still lost, of every layer that routes."""
        fed_heads = self.target.fed_heads(self.on_device(self.pilots[0]))
        sites = [site for site in self.routed_sites() if site.has_plain_output and site.name in fed_heads]
        kept = len(self.routed_sites()) - len(sites)
        if kept:
            why = "are quantised, adapted, offloaded or wrapped, or take heads that were gated or normalised before"
            logger.warning("The output projections of %d layers %s: they stay as they are.", kept, why)
        sums = OutputSums({site: self.target.routing_of(site) for site in sites})
        self.observe(self.batches, sums)
        return {site.name: sums.refit(site, self.config.output_ridge) for site in sites}

    def routed_sites(self) -> list[AttentionSite]:
        """The modules at which tokens skip heads."""
        return [site for site, heads in zip(self.sites, self.heads, strict=True) if not heads.is_dense]

    def observe(self, batches: Sequence[Mapping[str, Any]], statistics: Statistics) -> None:
        """Runs the model on batches, densely, and shows what its attention computes."""
        for batch in batches:
            self.target.observe(self.on_device(batch), statistics)
            self.step()

    def run_model(self, batch: Mapping[str, Any], routed: str | None) -> Any:
        """What the model says where that layer alone routes, or none."""
        output = self.target.run(self.on_device(batch), routed)
        self.step()
        return output

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch where the model computes."""
        device = self.sites[0].device
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def step(self) -> None:
        """One forward pass more is done."""
        self.done += 1
        if self.on_progress is not None:
            self.on_progress(self.done, self.steps)

    def require_all(self, seen: Mapping[str, Any]) -> None:
        """Every layer must have been reached by the batches."""
        missing = [site.name for site in self.sites if site.name not in seen]
        if missing:
            raise MixheadError(
                f"The batches never reach {missing[0]} (and {len(missing) - 1} more layers): give batches that use the "
                "whole model: pixel_values beside input_ids, encoder_hidden_states for a decoder alone."
            )


def first_samples(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The first samples of a batch; all of them where its tensors do not agree on their number (packed images)."""
    sizes = {value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim()}
    if len(sizes) != 1:
        return dict(batch)
    return {
        name: value[:count] if isinstance(value, Tensor) and value.dim() else value for name, value in batch.items()
    }


def comparable_output(outputs: Any) -> tuple[str, Tensor]:
    """What a model says, in a form that two runs can be compared in: ("logits", log-probabilities) or ("states", …)."""
    for name in ("logits", "logits_per_image"):
        logits = getattr(outputs, name, None)
        if logits is not None:
            return "logits", logits.float().log_softmax(-1)
    states = outputs if isinstance(outputs, Tensor) else getattr(outputs, "last_hidden_state", None)
    return "states", (outputs[0] if states is None else states).float()


def divergence(dense: tuple[str, Tensor], routed: tuple[str, Tensor]) -> float:
    """Mean KL divergence of the routed from the dense output in nats, or the relative squared error of states."""
    kind, expected = dense
    if kind == "logits":
        return float((expected.exp() * (expected - routed[1])).sum(-1).mean())
    return float((expected - routed[1]).square().sum() / expected.square().sum())
