"""`record_routing`: what every token used, in any model of this library, without changing what it computes.

How a model takes part:

1. Its attention layers choose heads through a `Router`, a submodule whose call returns a `Routing`. Nothing else is
   needed: each call of each router is recorded, under the path of the module that holds it (or its `moh_name`).
2. A module may say what its tokens are. Its method `routing_labels` is given what its `forward` is given, and returns
   integers or floats for the rows [B] or for the tokens [B, N] or [1, N], by name: `{"time_step": t, "class": y}`.
   They hold for all routers inside that module, where the shape fits. Every call with `input_ids` is labelled `token`
   already, and with a cache of transformers it continues the sequences of the call before. A model with a cache of its
   own says the same by the label `position`, [1, N].

Shape legend of this room: B batch, N tokens (queries), H query heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixhead.recording.file import Call, RecordingWriter, checked_path
from mixhead.routing.router import Router
from mixhead.routing.value import Routing


class CallCounter:
    """Knows which call of the model is running, and what is known of its tokens."""

    def __init__(self) -> None:
        self.names: dict[str, dict[int, str]] = {}
        self._scopes: list[tuple[dict[str, Tensor], int]] = []  # labels and offset of the modules that are running
        self._given: list[dict[str, Tensor]] = []
        self._number, self._seen = 0, set[str]()
        self._next_sequence = 0
        self._first: dict[int, tuple[int, int]] = {}  # by batch size: the last call and its first sequence

    @contextmanager
    def labelled(self, **labels: int | float | str) -> Iterator[None]:
        """`with log.labelled(task="summary"): model(**inputs)` labels every token of these calls."""
        values = {name: self._value(name, label) for name, label in labels.items()}
        self._given.append(values)
        try:
            yield
        finally:
            self._given.remove(values)

    def _value(self, name: str, label: int | float | str) -> Tensor:
        if not isinstance(label, str):
            return torch.tensor([label])
        texts = self.names.setdefault(name, {})
        known = {text: number for number, text in texts.items()}
        number = known.get(label, len(texts))
        texts[number] = label
        return torch.tensor([number])

    def enter(self, labels: Mapping[str, Tensor], offset: int | None) -> None:
        """A module that says something of its tokens begins."""
        if not self._scopes:
            self._begin()
        outer, outer_offset = self._scopes[-1] if self._scopes else ({}, 0)
        self._scopes.append(({**outer, **labels}, outer_offset if offset is None else offset))

    def leave(self) -> None:
        """It ends."""
        if self._scopes:
            self._scopes.pop()

    def _begin(self) -> None:
        self._number += 1
        self._seen.clear()

    def call_of(self, layer: str, routing: Routing) -> Call:
        """The call that this routing of the layer belongs to."""
        if not self._scopes and layer in self._seen:  # A part of the model runs on its own, once more.
            self._begin()
        self._seen.add(layer)
        labels, offset = self._scopes[-1] if self._scopes else ({}, 0)
        batch = routing.selected_BNH.shape[0]
        last, first = self._first.get(batch, (-1, 0))
        if last != self._number:
            if last < 0 or offset == 0:
                first, self._next_sequence = self._next_sequence, self._next_sequence + batch
            self._first[batch] = self._number, first
        given = {name: value for values in self._given for name, value in values.items()}
        return Call(self._number, first, offset, {**given, **labels})


class RoutingLog(CallCounter):
    """What every token used, on the disk: one byte for each gate. In memory stay only counts.

    Args:
        writer: where it is written.

    Attributes:
        about: what `save` remembers of the model, anything that JSON can hold.
    """

    def __init__(self, writer: RecordingWriter) -> None:
        super().__init__()
        self.about: dict[str, Any] = {}
        self._writer, self._loads = writer, LoadCounter()
        writer.names = self.names

    def record(self, name: str, routing: Routing) -> None:
        """Writes one routing."""
        self._writer.add(name, routing, self.call_of(name, routing))
        self._loads.add(name, routing)

    def load(self) -> dict[str, Tensor]:
        """Share of the real tokens that used each head, float32 [H], for every module that routes."""
        return self._loads.load()

    def save(self, path: str | Path) -> None:
        """Writes NAME.safetensors and NAME.json, which `mixhead.Recording` opens without the model.

        Args:
            path: NAME, with or without one of the two suffixes.

        Raises:
            MixheadError: where the folder of NAME does not exist.
        """
        self._writer.save(path, self.about)


class ExactLog:
    """What every token used, exactly as it was computed, in the memory of the CPU.

    Attributes:
        layers: (name of the attention module, its routing) of every call.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[str, Routing]] = []

    def record(self, name: str, routing: Routing) -> None:
        """Keeps selection, gates and probabilities, detached."""
        mask = routing.token_mask_BN
        kept = Routing(
            gates_BNH=routing.gates_BNH.detach().cpu(),
            selected_BNH=routing.selected_BNH.cpu(),
            probs_BNH=None if routing.probs_BNH is None else routing.probs_BNH.detach().cpu(),
            num_routed_heads=routing.num_routed_heads,
            token_mask_BN=None if mask is None else mask.cpu(),
        )
        self.layers.append((name, kept))

    def selected(self, name: str) -> Tensor:
        """All selections of one module, one call after the other along the tokens: bool [B, N, H]."""
        return torch.cat([routing.selected_BNH for layer, routing in self.layers if layer == name], dim=1)

    def load(self) -> dict[str, Tensor]:
        """Share of the real tokens that used each head, float32 [H], for every module that routes."""
        loads = LoadCounter()
        for name, routing in self.layers:
            loads.add(name, routing)
        return loads.load()


class LoadCounter:
    """Counts the tokens that use each head."""

    def __init__(self) -> None:
        self._used: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def add(self, name: str, routing: Routing) -> None:
        """Counts the real tokens of one routing."""
        real_BN = real_tokens(routing)
        used_H = (routing.selected_BNH.cpu() * real_BN.unsqueeze(-1)).sum((0, 1))
        self._used[name] = self._used.get(name, 0) + used_H
        self._tokens[name] = self._tokens.get(name, 0) + int(real_BN.sum())

    def load(self) -> dict[str, Tensor]:
        """Shares, float32 [H], by the name of the layer."""
        return {name: used_H.float() / max(self._tokens[name], 1) for name, used_H in self._used.items()}


def real_tokens(routing: Routing) -> Tensor:
    """bool [B, N] on the CPU, True at tokens that are no padding."""
    shape = routing.selected_BNH.shape[:2]
    mask_BN = routing.token_mask_BN
    return torch.ones(shape, dtype=torch.bool) if mask_BN is None else mask_BN.cpu().expand(shape)


@contextmanager
def record_routing(model: nn.Module, path: str | Path | None = None) -> Iterator[RoutingLog]:
    """`with mixhead.record_routing(model) as log: model(**inputs)` records what every token uses in every layer.

    It works for every model whose layers choose heads through a `Router`: converted models of transformers, also while
    they generate, and the models of this library; the head of this module says how a model of your own takes part. A
    compiled model runs without its compiled code meanwhile, since that calls no router.

    What is recorded goes to the disk as it comes, one byte for each gate, so memory does not grow however long the run.

    Args:
        model: any module.
        path: NAME of the recording: when the block ends, NAME.safetensors and NAME.json are there, and after an error
            neither. Without it the recording is a temporary one: `log.save(path)` keeps it, and it is deleted with
            `log`.

    Raises:
        MixheadError: where the folder of `path` does not exist.
    """
    writer = RecordingWriter(None if path is None else checked_path(path).parent)
    log = RoutingLog(writer)
    try:
        with router_hooks(model, log.record), labelled_calls(model, log):
            yield log
        if path is not None:
            log.save(path)
    finally:
        if path is not None:
            writer.discard()


@contextmanager
def keep_routing(model: nn.Module) -> Iterator[ExactLog]:
    """`record_routing` for computing with the routings of a few calls: exact, as tensors, and all of it in memory."""
    log = ExactLog()
    with router_hooks(model, log.record):
        yield log


@contextmanager
def router_hooks(model: nn.Module, record: Callable[[str, Routing], None]) -> Iterator[None]:
    """Calls `record` with every routing of the model's routers, and the name of the layer."""

    def listen(name: str) -> Any:
        def keep(_module: nn.Module, _args: Any, routing: Routing) -> None:
            # Gradient checkpointing computes a layer once more during backward, which is no further use.
            if torch._C._current_graph_task_id() == -1:
                record(name, routing)

        return keep

    with ExitStack() as stack:
        if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, router in routers_by_layer(model).items():
            stack.callback(router.register_forward_hook(listen(name)).remove)
        yield


@contextmanager
def labelled_calls(model: nn.Module, counter: CallCounter) -> Iterator[None]:
    """Tells the counter when modules run that say something of their tokens, and what they say."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counter.enter(*known_of_call(module, args, kwargs))

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        counter.leave()

    with ExitStack() as stack:
        for module in model.modules() if routers_by_layer(model) else ():  # who chooses no heads may have no positions
            if module is model or hasattr(module, "routing_labels") or takes_ids(module):
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


def routers_by_layer(model: nn.Module) -> dict[str, Router]:
    """The routers of a model by the name of the layer that each belongs to; one inside another router is part of it.

    Of a router that PEFT has copied, to train it, only the copy counts.
    """
    found: dict[str, Router] = {}
    paths = [path for path, module in model.named_modules() if isinstance(module, Router)]
    for path in paths:
        if any(path.startswith(f"{outer}.") or (outer == "" and path) for outer in paths):
            continue
        place = place_of(model, path)
        if place is None:
            continue
        holder = model.get_submodule(place.rpartition(".")[0])
        name = getattr(holder, "moh_name", "") or place.rpartition(".")[0] or place
        found[place if name in found else name] = model.get_submodule(path)  # type: ignore[assignment]
    return found


def place_of(model: nn.Module, path: str) -> str | None:
    """Where the model itself has the router at a path, in or out of a wrapper of PEFT; None for a copy not in use."""
    above, _, name = path.rpartition(".")
    if name == "original_module" and hasattr(model.get_submodule(above), "modules_to_save"):
        return None
    wrapper, _, inside = above.rpartition(".")
    if inside != "modules_to_save" or not hasattr(model.get_submodule(wrapper), "original_module"):
        return path
    return wrapper if name in model.get_submodule(wrapper).active_adapters else None  # type: ignore[operator]


def takes_ids(module: nn.Module) -> bool:
    """Whether the module is called with the numbers of its tokens, as language models are."""
    return "input_ids" in inspect.signature(module.forward).parameters


def known_of_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], int | None]:
    """What a module says of the tokens of a call, and where they begin in their sequences (None: it does not say)."""
    labels: dict[str, Tensor] = {}
    offset = None
    if takes_ids(module):
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        ids_BN, cache = given.get("input_ids"), kwargs.get("past_key_values", given.get("cache"))
        if isinstance(ids_BN, Tensor) and ids_BN.dim() == 2:
            labels["token"] = ids_BN
        if cache is not None and hasattr(cache, "get_seq_length"):
            offset = int(cache.get_seq_length())
    if hasattr(module, "routing_labels"):
        labels |= module.routing_labels(*args, **kwargs)  # type: ignore[operator]
    position_1N = labels.pop("position", None)
    return labels, offset if position_1N is None else int(position_1N.reshape(-1)[0])
