"""A converted model as calibration sees it: run with all heads and watched, or with one layer that routes."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mixhead.convert.dit import dit_sites, set_dit_layer_heads
from mixhead.convert.swap import refuse_sharded, set_layer_heads
from mixhead.errors import MixheadError
from mixhead.models.calibrated import CALIBRATED
from mixhead.models.hugging_face import AttentionSite, MoHModelMixin, find_sites
from mixhead.models.moh_dit import MoHDiT
from mixhead.routing import LayerHeads, Router


class Observer(Protocol):
    """What is shown the attention modules of a dense run."""

    def observe(self, name: str, hidden_BNC: Tensor, heads_BNHD: Tensor, token_mask_BN: Tensor | None) -> None:
        """Input and outputs of all heads of one module; False in the mask is padding."""
        ...


class RoutingParts(NamedTuple):
    """What a layer that routes has beyond its weights: its router, and what stands in for skipped heads."""

    router: Any
    skipped_HD: Tensor


class CalibrationTarget(ABC):
    """A converted model.

    Attributes:
        model: called with the entries of a batch.
        sites: its attention modules.
        heads: heads of each.
        groups: in how many groups of each equally many heads are active.
    """

    model: nn.Module
    sites: list[AttentionSite]
    heads: list[LayerHeads]
    groups: list[int]

    @abstractmethod
    def mark_calibrated(self, calibrated: bool) -> None:
        """Notes in the model's configuration whether its routers were fitted."""

    @abstractmethod
    def set_heads(self, index: int, heads: LayerHeads) -> None:
        """Gives the layer at an index other heads, with a fresh router."""

    @abstractmethod
    def routing_of(self, site: AttentionSite) -> RoutingParts:
        """Router and constants of a layer that routes."""

    @abstractmethod
    def observe(self, batch: Mapping[str, Any], observer: Observer) -> None:
        """Runs the model with all heads of every layer, and shows them."""

    @abstractmethod
    def fed_heads(self, batch: Mapping[str, Any]) -> set[str]:
        """Names of the modules whose output projection is fed the heads as they are, not gated nor normalised."""

    @abstractmethod
    def run(self, batch: Mapping[str, Any], routed: str | None) -> Any:
        """The model's output where that layer alone routes, or none."""


class ConvertedModel(CalibrationTarget):
    """A model of transformers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.sites = model, find_sites(model)
        self.heads = [LayerHeads(**layer) for layer in model.config.moh["layers"]]
        balanced = model.config.moh["group_balanced"]
        self.groups = [site.num_key_value_heads if balanced else 1 for site in self.sites]

    def mark_calibrated(self, calibrated: bool) -> None:
        """See `CalibrationTarget`."""
        cast(PreTrainedModel, self.model).config.moh[CALIBRATED] = calibrated

    def set_heads(self, index: int, heads: LayerHeads) -> None:
        """See `CalibrationTarget`."""
        set_layer_heads(cast(PreTrainedModel, self.model), self.sites[index], index, heads)

    def routing_of(self, site: AttentionSite) -> RoutingParts:
        """See `CalibrationTarget`."""
        return RoutingParts(site.module.moh_router, cast(Tensor, site.module.moh_skipped))

    def observe(self, batch: Mapping[str, Any], observer: Observer) -> None:
        """See `CalibrationTarget`."""

        def show(
            module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None,
            is_causal: bool | None, hidden_BNC: Tensor, token_mask_BN: Tensor | None,
        ) -> tuple[Tensor, None]:  # fmt: skip
            heads_BNHD, _ = sdpa_attention_forward(module, q, k, v, mask, 0.0, scaling, is_causal)
            observer.observe(cast(str, module.moh_name), hidden_BNC, heads_BNHD, token_mask_BN)
            return heads_BNHD, None

        self.model(**batch, stand_in=show)

    def fed_heads(self, batch: Mapping[str, Any]) -> set[str]:
        """See `CalibrationTarget`."""
        fed = FedHeads()
        with ExitStack() as hooks:
            for site in self.sites:
                look = functools.partial(fed.look, site.name)
                hooks.callback(site.output_projection.register_forward_pre_hook(look).remove)
            self.observe(batch, fed)
        return fed.names

    def run(self, batch: Mapping[str, Any], routed: str | None) -> Any:
        """See `CalibrationTarget`."""
        with only_routes(self.sites, "moh_router", routed):
            return self.model(**batch)


class FedHeads:
    """Compares what attention modules computed with what their output projections are fed.

    Attributes:
        names: of the modules where it was the same.
    """

    def __init__(self) -> None:
        self.heads: dict[str, list[Tensor]] = {}
        self.names: set[str] = set()

    def observe(self, name: str, hidden_BNC: Tensor, heads_BNHD: Tensor, token_mask_BN: Tensor | None) -> None:
        """See `Observer`."""
        self.heads.setdefault(name, []).append(heads_BNHD.flatten())

    def look(self, name: str, _projection: nn.Module, args: tuple[Tensor, ...]) -> None:
        """A forward pre-hook of the output projection."""
        heads = torch.cat(self.heads.pop(name)) if name in self.heads else None
        if heads is not None and torch.equal(heads.to(args[0]), args[0].flatten()):
            self.names.add(name)


class ConvertedDiT(CalibrationTarget):
    """A diffusion transformer."""

    def __init__(self, model: MoHDiT) -> None:
        self.model, self.sites, self.heads = model, dit_sites(model), list(model.config.layers)
        self.groups = [1] * len(self.heads)

    def mark_calibrated(self, calibrated: bool) -> None:
        """See `CalibrationTarget`."""
        model = cast(MoHDiT, self.model)
        model.config = replace(model.config, calibrated=calibrated)

    def set_heads(self, index: int, heads: LayerHeads) -> None:
        """See `CalibrationTarget`."""
        set_dit_layer_heads(cast(MoHDiT, self.model), index, heads)

    def routing_of(self, site: AttentionSite) -> RoutingParts:
        """See `CalibrationTarget`."""
        return RoutingParts(site.module.router, cast(Tensor, site.module.skipped_HD))

    def observe(self, batch: Mapping[str, Any], observer: Observer) -> None:
        """Without a router the heads reach the output projection as they are."""
        with only_routes(self.sites, "router", None), ExitStack() as hooks:
            for site in self.sites:
                hooks.enter_context(shown_heads(site, observer))
            self.model(**batch)

    def fed_heads(self, batch: Mapping[str, Any]) -> set[str]:
        """See `CalibrationTarget`."""
        return {site.name for site in self.sites}

    def run(self, batch: Mapping[str, Any], routed: str | None) -> Any:
        """See `CalibrationTarget`."""
        with only_routes(self.sites, "router", routed):
            return self.model(**batch)


@contextmanager
def marked_calibrated(target: CalibrationTarget) -> Iterator[None]:
    """The model counts as calibrated, meanwhile too; after an error it does not."""
    target.mark_calibrated(True)
    try:
        yield
    except BaseException:
        target.mark_calibrated(False)
        raise


@contextmanager
def only_routes(sites: list[AttentionSite], attribute: str, name: str | None) -> Iterator[None]:
    """One module keeps the router that stands under the attribute; every other uses all heads meanwhile."""
    others = [site.module for site in sites if site.name != name]
    routers = [getattr(module, attribute) for module in others]
    try:
        for module in others:
            setattr(module, attribute, None)
        yield
    finally:
        for module, router in zip(others, routers, strict=True):
            setattr(module, attribute, router)


@contextmanager
def shown_heads(site: AttentionSite, observer: Observer) -> Iterator[None]:
    """Shows what a dense attention module is given, and what its output projection is given."""
    hidden_BNC: list[Tensor] = []

    def enter(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden_BNC[:] = args[:1]

    def show(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        observer.observe(site.name, hidden_BNC[0], args[0].unflatten(-1, (site.num_heads, -1)), None)

    with ExitStack() as hooks:
        hooks.callback(site.module.register_forward_pre_hook(enter).remove)
        hooks.callback(site.output_projection.register_forward_pre_hook(show).remove)
        yield


def target_of(model: nn.Module) -> CalibrationTarget:
    """The model as calibration sees it; raises where it has no linear routers, or where they cannot be written."""
    refuse_sharded(model, "Calibrate")
    if any(
        weight.is_meta for router in model.modules() if isinstance(router, Router) for weight in router.parameters()
    ):
        raise MixheadError(
            "The routers of this model are offloaded, and cannot be written there: calibrate it before it is offloaded."
        )
    if isinstance(model, MoHDiT) and model.config.router == "linear" and model.config.shared_heads is not None:
        return ConvertedDiT(model)
    if not isinstance(model, MoHModelMixin) or model.config.moh["router"] != "linear":
        raise MixheadError(
            "mixhead.calibrate fits the linear router: convert the model with MoHConfig(router='linear')."
        )
    return ConvertedModel(cast(PreTrainedModel, model))
