"""The core: `head_attention` against `F.scaled_dot_product_attention` on all heads.

Shape legend: B batch, N queries, T keys, H query heads, K key-value heads, D head dim, R queries that are checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mixhead.bench.cases import Case, few_tokens
from mixhead.bench.routings import make_routing
from mixhead.bench.subject import MASKED, SDPA, check_engine, largest_error, torch_dtype
from mixhead.ops import head_attention
from mixhead.ops.attention import reference
from mixhead.routing import Routing

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}
# Scores that the reference may hold at once; where there are more, a part of the queries is checked.
MAX_SCORES = 2**24


@dataclass(frozen=True)
class CoreSpec:
    """One case of the core; see `Spec`. `by_token` lays q, k and v out as projections write them."""

    case: Case
    dtype: str
    routing: str
    share: float
    by_token: bool = False
    subject: str = "core"

    @property
    def title(self) -> str:
        """The shape, in words."""
        return self.case.title + (", by token" if self.by_token else "")

    @property
    def direction(self) -> str:
        """What is computed, in words."""
        return self.case.direction

    def build(self) -> Core:
        """Makes the tensors."""
        return Core(self)

    def small(self) -> CoreSpec:
        """The same on a few tokens."""
        return replace(self, case=few_tokens(self.case))


class Core:
    """Queries, keys, values and a routing; see `Subject`."""

    def __init__(self, spec: CoreSpec) -> None:
        torch.manual_seed(0)
        case, dtype = spec.case, torch_dtype(spec.dtype)
        self.case = case
        self.q_BHND = self._states(case.heads, case.tokens, dtype, spec.by_token)
        self.k_BKTD = self._states(case.kv_heads, case.num_keys, dtype, spec.by_token)
        self.v_BKTD = self._states(case.kv_heads, case.num_keys, dtype, spec.by_token)
        routing = make_routing(spec.routing, case.batch, case.tokens, case.heads, spec.share)
        self.routing = Routing(routing.gates_BNH.to(dtype), routing.selected_BNH)
        self.tolerance = TOLERANCE[dtype]

    def _states(self, heads: int, tokens: int, dtype: torch.dtype, by_token: bool) -> Tensor:
        case = self.case
        if by_token:
            states = torch.randn(case.batch, tokens, heads, case.head_dim).to(dtype).transpose(1, 2)
        else:
            states = torch.randn(case.batch, heads, tokens, case.head_dim).to(dtype)
        return states.requires_grad_(case.backward)

    def call(self, engine: str) -> Callable[[], object]:
        """One forward pass, with its backward pass where the case has one."""
        check_engine(engine, self.q_BHND)
        states, routing = (self.q_BHND, self.k_BKTD, self.v_BKTD), self.routing
        if not self.case.backward:
            return lambda: self.attend(engine, *states, routing)
        grad_BHND = torch.randn_like(self.q_BHND)
        return lambda: torch.autograd.grad(self.attend(engine, *states, routing), states, grad_BHND)

    def attend(self, engine: str, q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing) -> Tensor:
        """[B, H, N, D] under that engine."""
        if engine == SDPA:
            return all_heads(q_BHND, k_BKTD, v_BKTD, self.case.causal)
        if engine == MASKED:
            return masked(q_BHND, k_BKTD, v_BKTD, routing.gates_BNH, self.case.causal)
        return head_attention(q_BHND, k_BKTD, v_BKTD, routing, causal=self.case.causal, impl=engine)

    def error(self, engine: str) -> float:
        """Compares the heads of one key-value head: outputs and gradients."""
        check_engine(engine, self.q_BHND)
        case, groups = self.case, self.case.heads // self.case.kv_heads
        rows_R = rows_to_check(case.tokens, case.batch * groups * case.num_keys)
        grad_BHND = torch.zeros_like(self.q_BHND)
        grad_BHND[:, :, rows_R] = torch.randn_like(grad_BHND[:, :, rows_R])
        leaves = (self.q_BHND, self.k_BKTD, self.v_BKTD, self.routing.gates_BNH)
        leaves = tuple(leaf.detach().requires_grad_(case.backward) for leaf in leaves)  # type: ignore[assignment]
        out_BHND = self.attend(engine, *leaves[:3], Routing(leaves[3], self.routing.selected_BNH))
        # One key-value head with its query heads, in float64.
        exact = (leaves[0][:, :groups], leaves[1][:, :1], leaves[2][:, :1], leaves[3][..., :groups])
        exact = tuple(leaf.detach().double().requires_grad_(case.backward) for leaf in exact)  # type: ignore[assignment]
        selected_BNH = self.routing.selected_BNH[..., :groups]
        exact_BHRD = exact_rows(*exact, selected_BNH, rows_R, case.causal)
        actual, expected = [out_BHND[:, :groups, rows_R].detach()], [exact_BHRD.detach()]
        if case.backward:
            dq, dk, dv, dgates = torch.autograd.grad(out_BHND, leaves, grad_BHND)
            actual += [dq[:, :groups], dk[:, :1], dv[:, :1], dgates[..., :groups]]
            # The gradient of a gate is defined at selected heads only.
            actual[-1] = actual[-1] * selected_BNH
            expected += torch.autograd.grad(exact_BHRD, exact, grad_BHND[:, :groups, rows_R].double())
        return largest_error(actual, expected)


def all_heads(q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, causal: bool) -> Tensor:
    """The stock kernel. A single query sees all keys, so it needs no mask."""
    is_causal = causal and q_BHND.shape[2] > 1
    grouped = q_BHND.shape[1] != k_BKTD.shape[1]
    return F.scaled_dot_product_attention(q_BHND, k_BKTD, v_BKTD, is_causal=is_causal, enable_gqa=grouped)


def masked(q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, gates_BNH: Tensor, causal: bool) -> Tensor:
    """All heads, then the gates, 0 where a head is not selected: what the published implementations compute."""
    return torch.einsum("bnh,bhnd->bhnd", gates_BNH, all_heads(q_BHND, k_BKTD, v_BKTD, causal))


def rows_to_check(tokens: int, scores_of_a_row: int) -> Tensor:
    """Positions [R] of the queries that are compared, evenly spaced: all, or as many as the reference may hold."""
    count = min(tokens, max(1, MAX_SCORES // scores_of_a_row))
    return torch.linspace(0, tokens - 1, count).round().long()


def exact_rows(
    q_BHND: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    gates_BNH: Tensor,
    selected_BNH: Tensor,
    rows_R: Tensor,
    causal: bool,
) -> Tensor:
    """The reference at some of the queries, [B, H, R, D]."""
    tokens, keys = q_BHND.shape[2], k_BKTD.shape[2]
    allowed_RT = torch.arange(keys) <= rows_R.unsqueeze(-1) + (keys - tokens)
    return reference.attend(
        q_BHND[:, :, rows_R],
        k_BKTD,
        v_BKTD,
        Routing(gates_BNH[:, rows_R], selected_BNH[:, rows_R]),
        causal=False,
        scale=q_BHND.shape[-1] ** -0.5,
        attn_mask=allowed_RT[None, None] if causal else None,
    )
