"""A whole causal language model: converted, against its dense self with the same weights.

Shape legend: B batch, N tokens, V vocabulary, S tokens that are checked.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mixhead import store
from mixhead.bench.cases import DECODE
from mixhead.bench.routings import OWN, RANDOM, SKEWED, GivenRouting, fitted, load_recording, make_routing
from mixhead.bench.subject import MASKED, SDPA, check_engine, largest_error, torch_dtype
from mixhead.convert import MoHConfig, convert, revert
from mixhead.errors import MixheadError
from mixhead.models.calibrated import CALIBRATED
from mixhead.models.context import check_room
from mixhead.models.hugging_face import MoHModelMixin
from mixhead.recording import keep_routing
from mixhead.routing import Routing

PREFILL, TRAINING = "prefill", "forward + backward"
DIRECTIONS = {"forward": PREFILL, "backward": TRAINING, "decode": DECODE}
TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-4, torch.bfloat16: 5e-2}
CHECKED_TOKENS = 256
LLAMA = "llama:"


@dataclass(frozen=True)
class ModelSpec:
    """One case of a whole model; see `Spec`.

    Attributes:
        source: a model folder, or the shape of a Llama with random weights, as in `llama:layers=4,heads=9`.
        config: how it is converted; a model that is converted already stays as it is.
        direction: `PREFILL`, `TRAINING` or `DECODE` (one token; `tokens` are cached).
        batch: B.
        tokens: N.
        dtype: of weights and computation.
        routing: "own" (the routers' own choice), "random", "skewed" or a recorded file. The routers are computed and
            paid for in any case.
    """

    source: str
    config: MoHConfig
    direction: str
    batch: int
    tokens: int
    dtype: str
    routing: str
    subject: str = "model"

    @property
    def title(self) -> str:
        """The model and the shape, in words."""
        name = self.source if self.source.startswith(LLAMA) else Path(self.source).name
        return f"{name}, {self.batch} x {self.tokens}" + (" cached" if self.direction == DECODE else "")

    @property
    def share(self) -> float:
        """The share of the heads that an average token uses."""
        return share_of(self.source, self.config)

    def build(self) -> Model:
        """Loads and converts the model."""
        return Model(self)

    def small(self) -> ModelSpec:
        """The same on a few tokens."""
        return replace(self, batch=1, tokens=min(self.tokens, 128))


class Model:
    """A dense model and its converted self, which share their weights; see `Subject`."""

    def __init__(self, spec: ModelSpec) -> None:
        torch.manual_seed(0)
        self.spec = spec
        self.dense, self.converted = both(load(spec.source, torch_dtype(spec.dtype)), spec.config)
        check_room(self.dense, spec.tokens + (spec.direction == DECODE), "The benchmark")
        give_routing(self.converted, spec)
        self.tolerance = TOLERANCE[torch_dtype(spec.dtype)]
        for model in (self.dense, self.converted):
            model.train(spec.direction == TRAINING)
        self.ids_BN = torch.randint(self.dense.config.vocab_size, (spec.batch, spec.tokens))
        self.cache = self.filled_cache() if spec.direction == DECODE else None

    @torch.no_grad()
    def filled_cache(self) -> DynamicCache:
        """The keys and values that the dense model caches for the tokens."""
        cache = DynamicCache(config=self.dense.config)
        self.dense.eval()(self.ids_BN, cache=cache, use_cache=True, logits_to_keep=1)
        return cache

    def call(self, engine: str) -> Callable[[], object]:
        """One prefill, one token of decoding, or one forward and backward pass (no optimizer)."""
        model, keywords = self.under(engine)
        if self.spec.direction == TRAINING:
            return lambda: train_step(model, self.ids_BN, **keywords)
        if self.cache is not None:
            return lambda: decode_step(model, self.ids_BN[:, :1], self.cache, **keywords)
        return torch.no_grad()(lambda: model(self.ids_BN, use_cache=True, logits_to_keep=1, **keywords))

    def under(self, engine: str) -> tuple[Any, dict[str, str]]:
        """The model that runs, and the keywords that choose the engine; masking is the stock kernel, then gates."""
        if engine == SDPA:
            return self.dense, {}
        check_engine(engine, next(self.converted.parameters()))
        return self.converted, {"head_attention_impl": "dense" if engine == MASKED else engine}

    def error(self, engine: str) -> float:
        """Compares the logits, and in training the gradient, with the reference in float64.

        The engine runs at full length. Since the model is causal, the first tokens do not depend on the others, so the
        reference computes those only. Both take the same routing: in float64 a router may choose differently where two
        heads are almost equal, and all later layers with it.
        """
        with self.same_routing() as exact:
            if self.cache is not None:
                return self.error_of_decoding(engine, exact)
            model, keywords = self.under(engine)
            checked = min(CHECKED_TOKENS, self.spec.tokens)
            training = self.spec.direction == TRAINING
            actual = outcome(model, self.ids_BN, checked, training, **keywords)
            ids_BS = self.ids_BN[:, :checked]
            expected = outcome(exact, ids_BS, checked, training, head_attention_impl="reference")
        error = largest_error(actual[:1], expected[:1])
        return max(error, distance(actual[1:], expected[1:])) if training else error

    @torch.no_grad()
    def error_of_decoding(self, engine: str, exact: Any) -> float:
        """Compares the logits of the next token, after the same cache."""
        assert self.cache is not None
        exact_cache = DynamicCache(config=self.dense.config)
        for index, layer in enumerate(self.cache.layers):
            exact_cache.update(layer.keys.double(), layer.values.double(), index)
        model, keywords = self.under(engine)
        actual = decode_step(model, self.ids_BN[:, :1], self.cache, **keywords)
        expected = decode_step(exact, self.ids_BN[:, :1], exact_cache, head_attention_impl="reference")
        return largest_error([actual.logits], [expected.logits])

    @contextmanager
    def same_routing(self) -> Iterator[Any]:
        """A copy of the converted model in float64; inside, both take one and the same routing."""
        model = self.converted
        was_training = model.training
        model.eval()
        exact = copy.deepcopy(model).double()
        routings = self.routings()
        own = {name: router(model, name) for name in routings}
        checked = slice(None, CHECKED_TOKENS if self.cache is None else None)
        try:
            for name, routing in routings.items():
                replace_router(model, name, GivenRouting(own[name], routing))
                cut = Routing(routing.gates_BNH[:, checked], routing.selected_BNH[:, checked])
                replace_router(exact, name, GivenRouting(router(exact, name), cut))
            yield exact
        finally:
            for name, given in own.items():
                replace_router(model, name, given)
            model.train(was_training)

    @torch.no_grad()
    def routings(self) -> dict[str, Routing]:
        """The routing of every layer: what it was given, or what its router chooses."""
        routers = {name: module.moh_router for name, module in self.converted.named_modules() if has_router(module)}
        if self.spec.routing != OWN:
            return {name: Routing(given.gates_BNH, given.selected_BNH) for name, given in routers.items()}
        with keep_routing(self.converted) as log:
            if self.cache is None:
                self.converted(self.ids_BN, use_cache=False, logits_to_keep=1)
            else:
                decode_step(self.converted, self.ids_BN[:, :1], self.cache)
        return dict(log.layers)


def load(source: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder, or a Llama of random weights."""
    if source.startswith(LLAMA):
        return LlamaForCausalLM(llama_config(source)).to(dtype)
    folder = store.check_folder(source)
    config = store.load_config(folder)
    store.check_writes_text(folder, config)
    return store.load_as(AutoModelForCausalLM, folder, config, dtype)


def llama_config(source: str) -> LlamaConfig:
    """Reads `llama:layers=4,hidden=576,heads=9,kv=3,intermediate=1536,vocab=1024`; what is left out is as here."""
    sizes = {"layers": 4, "hidden": 576, "heads": 9, "kv": 3, "intermediate": 1536, "vocab": 1024}
    for part in filter(None, source.removeprefix(LLAMA).split(",")):
        name, _, value = part.partition("=")
        if name not in sizes or not value.isdigit() or int(value) < 1:
            raise MixheadError(f"{source} is no shape: {part!r} is not one of {', '.join(sizes)} with a whole number.")
        sizes[name] = int(value)
    if sizes["hidden"] % sizes["heads"] or sizes["heads"] % sizes["kv"]:
        raise MixheadError(f"{source} is no shape: heads must divide hidden, and kv must divide heads.")
    return LlamaConfig(
        num_hidden_layers=sizes["layers"],
        hidden_size=sizes["hidden"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv"],
        intermediate_size=sizes["intermediate"],
        vocab_size=sizes["vocab"],
        max_position_embeddings=131_072,
    )


def both(model: PreTrainedModel, config: MoHConfig) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(dense, converted), with the same parameters in memory once."""
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    if isinstance(model, MoHModelMixin):
        return revert(twin), model
    converted = convert(twin, config)
    converted.config.moh[CALIBRATED] = True  # which heads it chooses is given, or does not matter here
    return model, converted


def share_of(source: str, config: MoHConfig) -> float:
    """The share of active heads, from the configuration alone."""
    if source.startswith(LLAMA):
        described: Any = llama_config(source)
    else:
        described = store.load_config(store.check_folder(source))
    if hasattr(described, "moh"):
        layers = described.moh["layers"]
        return float(sum(layer["active_heads"] for layer in layers) / sum(layer["num_heads"] for layer in layers))
    heads = described.num_attention_heads
    [layer] = config.resolve([heads], [getattr(described, "num_key_value_heads", None) or heads])
    return layer.active_heads / layer.num_heads


def give_routing(model: PreTrainedModel, spec: ModelSpec) -> None:
    """Lets the routers' decisions be replaced by random, skewed or recorded ones."""
    if spec.routing == OWN:
        return
    recorded = {} if spec.routing in (RANDOM, SKEWED) else load_recording(Path(spec.routing))
    for name in [name for name, module in model.named_modules() if has_router(module)]:
        own: Any = router(model, name)
        if recorded:
            if name not in recorded:
                raise MixheadError(f"{spec.routing} records no layer {name}: it comes from another model.")
            given = fitted([recorded[name]] * spec.batch, spec.tokens, own.num_heads, spec.routing)
        else:
            given = make_routing(spec.routing, spec.batch, spec.tokens, own.num_heads, own.active_heads / own.num_heads)
            given = Routing(given.selected_BNH.float(), given.selected_BNH)  # Converted models have gates of 0 and 1.
        replace_router(model, name, GivenRouting(own, given))


def has_router(module: nn.Module) -> bool:
    """Whether it is an attention module that routes."""
    return getattr(module, "moh_router", None) is not None


def router(model: nn.Module, name: str) -> nn.Module:
    """The router of an attention module."""
    return model.get_submodule(name).moh_router  # type: ignore[return-value]


def replace_router(model: nn.Module, name: str, new: nn.Module) -> None:
    """Another router for an attention module."""
    model.get_submodule(name).moh_router = new


def train_step(model: Any, ids_BN: Tensor, **keywords: str) -> Tensor:
    """A forward and a backward pass of the next-token loss; gradients begin at none."""
    model.zero_grad(set_to_none=True)
    loss: Tensor = model(ids_BN, labels=ids_BN, use_cache=False, **keywords).loss
    loss.backward()
    return loss


@torch.no_grad()
def decode_step(model: Any, ids_B1: Tensor, cache: Any, **keywords: str) -> Any:
    """One token after the cache, which is as long afterwards as before."""
    output = model(ids_B1, cache=cache, use_cache=True, logits_to_keep=1, **keywords)
    cache.crop(-1)
    return output


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Length of the difference of two gradients of all weights, relative to the length of the expected one."""
    difference = sum(float((a.double() - e).square().sum()) for a, e in zip(actual, expected, strict=True))
    length = sum(float(e.square().sum()) for e in expected)
    return math.sqrt(difference / length) if math.isfinite(difference) else math.inf


def outcome(model: Any, ids_BN: Tensor, checked: int, training: bool, **keywords: str) -> list[Tensor]:
    """Logits [B, S, V] of the first tokens, and in training the gradients that their loss has."""
    with torch.set_grad_enabled(training):
        logits_BSV = model(ids_BN, use_cache=False, logits_to_keep=torch.arange(checked), **keywords).logits
    if not training:
        return [logits_BSV]
    weights = {name: p for name, p in model.named_parameters() if ".moh_router." not in name}
    model.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(logits_BSV.flatten(0, 1).double(), ids_BN[:, :checked].flatten())
    gradients = torch.autograd.grad(loss, list(weights.values()))
    return [logits_BSV.detach(), *gradients]
