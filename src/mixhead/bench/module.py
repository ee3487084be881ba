"""The module: `MixtureOfHeadAttention` against the same projections around the stock kernel on all heads.

Shape legend: B batch, N queries, T keys, C hidden size, H query heads, K key-value heads, D head dim, R queries that
are checked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixhead.bench.cases import DECODE, Case, few_tokens
from mixhead.bench.core import all_heads, exact_rows, rows_to_check
from mixhead.bench.routings import OWN, GivenRouting, active_heads, make_routing
from mixhead.bench.subject import MASKED, SDPA, check_engine, largest_error, torch_dtype
from mixhead.nn import MixtureOfHeadAttention
from mixhead.routing import Routing

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class ModuleSpec:
    """One case of the module; see `Spec`. The router is the learned two-stage router of the MoH paper."""

    case: Case
    dtype: str
    routing: str
    share: float
    subject: str = "module"

    @property
    def title(self) -> str:
        """The shape, in words."""
        return self.case.title

    @property
    def direction(self) -> str:
        """What is computed, in words."""
        return self.case.direction

    def build(self) -> Module:
        """Makes the layer and its input."""
        return Module(self)

    def small(self) -> ModuleSpec:
        """The same on a few tokens."""
        return replace(self, case=few_tokens(self.case))


class FullCache:
    """A key-value cache with room for one token more, which every call writes anew: the step of decoding itself."""

    def __init__(self, k_BKTD: Tensor, v_BKTD: Tensor) -> None:
        self.k_BKTD, self.v_BKTD = k_BKTD, v_BKTD

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Writes the last place and returns all of them."""
        del layer_idx
        self.k_BKTD[:, :, -1:], self.v_BKTD[:, :, -1:] = key_states, value_states
        return self.k_BKTD, self.v_BKTD


class Module:
    """A layer with its input; see `Subject`."""

    def __init__(self, spec: ModuleSpec) -> None:
        torch.manual_seed(0)
        case, dtype = spec.case, torch_dtype(spec.dtype)
        self.case = case
        active, size = active_heads(case.heads, spec.share), case.heads * case.head_dim
        self.layer = MixtureOfHeadAttention(size, case.heads, 0, active, num_key_value_heads=case.kv_heads).to(dtype)
        if spec.routing != OWN:
            routing = make_routing(spec.routing, case.batch, case.tokens, case.heads, spec.share)
            self.layer.router = GivenRouting(self.layer.router, routing)
        self.hidden_BNC = torch.randn(case.batch, case.tokens, size).to(dtype).requires_grad_(case.backward)
        self.cache = None
        if case.direction == DECODE:
            shape = (case.batch, case.kv_heads, case.num_keys, case.head_dim)
            self.cache = FullCache(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))
        self.tolerance = TOLERANCE[dtype]

    def call(self, engine: str) -> Callable[[], object]:
        """One pass through the layer; gradients of the input and of all weights."""
        check_engine(engine, self.hidden_BNC)
        if not self.case.backward:
            return torch.no_grad()(lambda: self.run(engine))
        grad_BNC = torch.randn_like(self.hidden_BNC)
        leaves = [self.hidden_BNC, *self.layer.parameters()]
        return lambda: torch.autograd.grad(self.run(engine), leaves, grad_BNC, allow_unused=True)

    def run(self, engine: str) -> Tensor:
        """[B, N, C] under that engine."""
        if engine in (SDPA, MASKED):
            return self.stock(self.layer, self.hidden_BNC, gated=engine == MASKED)
        out_BNC = self.layer(self.hidden_BNC, causal=self.case.causal, past_key_values=self.cache, impl=engine)
        assert isinstance(out_BNC, Tensor)
        return out_BNC

    def stock(self, layer: MixtureOfHeadAttention, hidden_BNC: Tensor, *, gated: bool) -> Tensor:
        """The layer with the stock kernel on all heads, without its router or with the gates afterwards."""
        q_BHND, k_BKTD, v_BKTD = self.projected(layer, hidden_BNC)
        out_BHND = all_heads(q_BHND, k_BKTD, v_BKTD, self.case.causal)
        if gated:
            routing = layer.router(hidden_BNC, q_BHND, None)
            out_BHND = torch.einsum("bnh,bhnd->bhnd", routing.gates_BNH.to(out_BHND.dtype), out_BHND)
        return layer.o_proj(out_BHND.transpose(1, 2).flatten(2))

    def projected(self, layer: MixtureOfHeadAttention, hidden_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and keys and values with the cached ones before them."""
        projections = (layer.q_proj, layer.k_proj, layer.v_proj)
        q_BHND, k_BKTD, v_BKTD = (
            projection(hidden_BNC).unflatten(-1, (-1, self.case.head_dim)).transpose(1, 2) for projection in projections
        )
        if self.cache is not None:
            k_BKTD, v_BKTD = self.cache.update(k_BKTD, v_BKTD, 0)
        return q_BHND, k_BKTD, v_BKTD

    def error(self, engine: str) -> float:
        """Compares the output, and the gradients of the input and of the four projections, at one and the same routing.

        The routing is taken once, since in float64 a router may choose differently where two heads are almost equal.
        """
        check_engine(engine, self.hidden_BNC)
        with torch.no_grad():
            routing = self.layer.router(self.hidden_BNC, self.projected(self.layer, self.hidden_BNC)[0], None)
        mine = copy.copy(self)
        mine.layer = self.with_routing(routing)
        mine.hidden_BNC = self.hidden_BNC.detach().requires_grad_(self.case.backward)
        exact = copy.copy(self)
        exact.layer = self.with_routing(routing).double()
        exact.hidden_BNC = self.hidden_BNC.detach().double().requires_grad_(self.case.backward)
        if self.cache is not None:
            exact.cache = FullCache(self.cache.k_BKTD.double(), self.cache.v_BKTD.double())
        case = self.case
        rows_R = rows_to_check(case.tokens, case.batch * case.heads * case.num_keys)
        with torch.set_grad_enabled(case.backward):
            out_BRC, exact_BRC = mine.run(engine)[:, rows_R], exact.exact_output(routing, rows_R)
        actual, expected = [out_BRC.detach()], [exact_BRC.detach()]
        if case.backward:
            grad_BRC = torch.randn_like(out_BRC)
            actual += torch.autograd.grad(out_BRC, mine.leaves(), grad_BRC)
            expected += torch.autograd.grad(exact_BRC, exact.leaves(), grad_BRC.double())
        return largest_error(actual, expected)

    def with_routing(self, routing: Routing) -> MixtureOfHeadAttention:
        """A copy of the layer that always routes so."""
        layer = copy.deepcopy(self.layer)
        layer.router = GivenRouting(layer.router, routing)
        return layer

    def leaves(self) -> list[Tensor]:
        """What has a gradient whatever the routing is."""
        layer = self.layer
        return [self.hidden_BNC, *(p.weight for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj))]

    def exact_output(self, routing: Routing, rows_R: Tensor) -> Tensor:
        """The reference at some of the queries, [B, R, C]."""
        states = self.projected(self.layer, self.hidden_BNC)
        gates_BNH = routing.gates_BNH.double()
        out_BHRD = exact_rows(*states, gates_BNH, routing.selected_BNH, rows_R, self.case.causal)
        return self.layer.o_proj(out_BHRD.transpose(1, 2).flatten(2))
