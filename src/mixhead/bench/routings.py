"""Which heads the tokens of a benchmark use: at random, skewed, or as a real model was recorded.

A recorded file holds, for every layer of one prompt, `<layer>.gates` [B, N, H] and `<layer>.selected` (bool, alike).

Shape legend: B batch, N tokens, H query heads, C hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mixhead.errors import MixheadError
from mixhead.files import write_bytes
from mixhead.recording import ExactLog, keep_routing
from mixhead.routing import Router, Routing

RANDOM, SKEWED, OWN = "random", "skewed", "own"


def make_routing(kind: str, batch: int, tokens: int, heads: int, share: float) -> Routing:
    """A routing of that kind; gates are between 0.5 and 1.5, but for a recorded one.

    Args:
        kind: "random" (every token uses round(share * H) heads), "skewed" (one head used by 90% of the tokens, one by
            10%, the others alike), or a file that `save_recording` wrote (`share` is then the file's own).
        batch: B.
        tokens: N.
        heads: H.
        share: of the heads that an average token uses; 1 is all of them.
    """
    if kind not in (RANDOM, SKEWED):
        recorded = load_recording(Path(kind))
        layers = list(recorded.values())
        return fitted([layers[row % len(layers)] for row in range(batch)], tokens, heads, kind)
    if share >= 1:
        selected_BNH = torch.ones(batch, tokens, heads, dtype=torch.bool)
    elif kind == SKEWED:
        selected_BNH = torch.rand(batch, tokens, heads) < skewed_shares(heads, share)
    else:
        order_BNH = torch.rand(batch, tokens, heads).argsort(-1).argsort(-1)
        selected_BNH = order_BNH < active_heads(heads, share)
    return Routing((0.5 + torch.rand(selected_BNH.shape)) * selected_BNH, selected_BNH)


def active_heads(heads: int, share: float) -> int:
    """The nearest whole number of heads, at least one."""
    return max(1, round(share * heads))


def skewed_shares(heads: int, share: float) -> Tensor:
    """The share of the tokens that uses each head, float32 [H]; their mean is `share`."""
    if heads < 3 or not 1 <= share * heads <= heads - 1:
        raise MixheadError(f"Skewed routing needs at least 3 heads and a share between them: {share:.0%} of {heads}.")
    shares_H = torch.full((heads,), (share * heads - 1.0) / (heads - 2))
    shares_H[0], shares_H[1] = 0.9, 0.1
    return shares_H


def fitted(layers: list[Routing], tokens: int, heads: int, name: str) -> Routing:
    """Recorded layers as rows of a batch, repeated or cut to the tokens wanted."""
    rows = []
    for layer in layers:
        if layer.selected_BNH.shape[-1] != heads:
            raise MixheadError(f"{name} records {layer.selected_BNH.shape[-1]} heads, but {heads} are wanted.")
        index_N = torch.arange(tokens) % layer.selected_BNH.shape[1]
        rows.append((layer.gates_BNH[:1, index_N], layer.selected_BNH[:1, index_N]))
    return Routing(torch.cat([gates for gates, _ in rows]).float(), torch.cat([selected for _, selected in rows]))


def record(model: nn.Module, ids_1N: Tensor, file: Path) -> int:
    """Writes what the tokens of a prompt use in a converted language model; returns how many layers route."""
    with torch.no_grad(), keep_routing(model) as log:
        model(ids_1N, use_cache=False)
    save_recording(log, file)
    return len(log.layers)


def save_recording(log: ExactLog, file: Path) -> None:
    """Writes what a model's tokens used; of a layer that was called several times, the first call."""
    tensors = {}
    for name, routing in reversed(log.layers):
        tensors[f"{name}.gates"] = routing.gates_BNH.float().contiguous()
        tensors[f"{name}.selected"] = routing.selected_BNH.contiguous()
    if not tensors:
        raise MixheadError("Nothing was recorded: the model routes in no layer.")
    write_bytes(file, save(tensors))


def load_recording(file: Path) -> dict[str, Routing]:
    """The recorded routings by layer, in the order of the layers."""
    if not file.is_file():
        raise MixheadError(f"--routing takes random, skewed or a recorded file, and there is no file {file}.")
    try:
        tensors = load_file(file)
        names = sorted((n.removesuffix(".gates") for n in tensors if n.endswith(".gates")), key=by_number)
        layers = {name: Routing(tensors[f"{name}.gates"], tensors[f"{name}.selected"]) for name in names}
    except (SafetensorError, KeyError) as error:
        raise MixheadError(f"{file} is no recorded routing ({error}); `mixhead bench record` writes one.") from error
    if not layers:
        raise MixheadError(f"{file} holds no recorded routing; `mixhead bench record` writes one.")
    return layers


def by_number(name: str) -> list[tuple[int, str]]:
    """Sorts `layers.10` behind `layers.9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


class GivenRouting(Router):
    """A router whose decision is replaced: it is computed and paid for, then the given heads are used.

    Args:
        router: the router of the layer; its probabilities, and so its balance loss, are kept.
        routing: gates and selection [B, N, H]; a call with fewer tokens takes the last ones.
    """

    gates_BNH: Tensor
    selected_BNH: Tensor

    def __init__(self, router: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.router = router
        self.register_buffer("gates_BNH", routing.gates_BNH, persistent=False)
        self.register_buffer("selected_BNH", routing.selected_BNH, persistent=False)
        self.needs_query = getattr(router, "needs_query", True)

    def forward(self, hidden_BNC: Tensor, q_BHND: Tensor | None = None, token_mask_BN: Tensor | None = None) -> Routing:
        own: Routing = self.router(hidden_BNC, q_BHND, token_mask_BN)
        last = slice(self.gates_BNH.shape[1] - hidden_BNC.shape[1], None)
        gates_BNH = self.gates_BNH[:, last].to(own.gates_BNH.dtype)
        return replace(own, gates_BNH=gates_BNH, selected_BNH=self.selected_BNH[:, last])
