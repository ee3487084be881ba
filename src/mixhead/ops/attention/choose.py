"""Which engine `impl="auto"` takes: on the CPU by what was measured on this processor, see `mixhead.ops.crossover`.

Inside torch.compile the answer is a constant of the graph: it rests on static sizes, or on all that a graph of symbolic
sizes may meet, and never on what tensors hold.

Shape legend: B batch, N queries, T keys, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mixhead.ops import cpu, triton
from mixhead.ops.choice import Choice
from mixhead.ops.crossover.rulings import Ruling, What, known, look_up, ruling, share_of, table_now
from mixhead.ops.crossover.table import Table, inside
from mixhead.routing import Routing

MIN_COUNTED = 512  # tokens times heads
FEW_QUERIES = 7  # against more keys: what the kernel does for a cache is another thing than what it does for a prompt

# On devices, where nothing was measured.
TRITON_MIN_QUERIES = 128
SLOTS_MIN_QUERIES = 512
SLOTS_MAX_SHARE = 0.5

WITHOUT = "torch.func, forward-mode derivatives and torch.jit.trace need the plain operations of PyTorch"


def explain(
    q_BHND: Tensor, k_BKTD: Tensor, routing: Routing, *, causal: bool = False, attn_mask: Tensor | None = None
) -> Choice:
    """Which implementation `impl="auto"` takes for these arguments, and why."""
    if q_BHND.numel() == 0 or k_BKTD.numel() == 0:
        return Choice("reference", "there is nothing to compute: there are no queries or no keys")
    if q_BHND.device.type != "cpu":
        return on_device(q_BHND, k_BKTD, routing, attn_mask)
    if cpu.transformed():
        return Choice("reference", WITHOUT)
    why = cpu.refusal(q_BHND, attn_mask)
    if why is None:
        gradient = wants_gradient(q_BHND, k_BKTD, routing.gates_BNH)
        limit, why = ruling_of("cpu", q_BHND, k_BKTD, causal, attn_mask is not None, gradient)
        if limit >= 1.0 or (limit > 0.0 and worth_counting(routing) and share_of(routing) <= limit):
            return Choice("cpu", why)
    return portable(q_BHND, k_BKTD, routing, causal, attn_mask, why)


def kernel_at_once(q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing, causal: bool) -> bool:
    """Whether without a mask `explain` names the C++ kernel whatever is selected, asked in the fewest steps.

    Asked first in every call, because all other questions together take as long as the attention of one token. Whether
    the arguments fit each other is left to the kernel.
    """
    gates_BNH = routing.gates_BNH
    return (
        gates_BNH.is_cpu
        and routing.selected_BNH.is_cpu
        and kernel_pays(q_BHND, k_BKTD, v_BKTD, causal, wants_gradient(q_BHND, k_BKTD, gates_BNH))
    )


def kernel_pays(q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, causal: bool, gradient: bool) -> bool:
    """The same, whatever the routing."""
    if not (
        not torch.compiler.is_compiling()
        and cpu.loaded_level() is not None
        and q_BHND.is_cpu
        and k_BKTD.is_cpu
        and v_BKTD.is_cpu
        and not cpu.transformed()
        and not torch.is_autocast_enabled("cpu")
    ):
        return False
    q_shape, k_shape = q_BHND.shape, k_BKTD.shape
    if not (len(q_shape) == len(k_shape) == 4 and q_shape[0] and q_shape[1]):
        return False
    width, query_digits, key_digits = q_shape[3], q_shape[2].bit_length(), k_shape[2].bit_length()
    table, dtype = table_now("attention"), q_BHND.dtype
    return ruling_of_class(table, "cpu", dtype, width, query_digits, key_digits, causal, False, gradient)[0] >= 1.0


def portable(
    q_BHND: Tensor, k_BKTD: Tensor, routing: Routing, causal: bool, attn_mask: Tensor | None, why: str
) -> Choice:
    """The choice among what is written in PyTorch, where `why` says what is wrong with the kernel."""
    gradient = wants_gradient(q_BHND, k_BKTD, routing.gates_BNH)
    if (share := packed_share(q_BHND, k_BKTD, routing, attn_mask)) is not None:
        limit, measured = ruling_of("slots", q_BHND, k_BKTD, causal, False, gradient)
        if share <= limit:
            return Choice("slots", f"{why}; {measured}")
    if not (causal or attn_mask is not None or torch.compiler.is_compiling()):
        limit, measured = ruling_of("gathered", q_BHND, k_BKTD, causal, False, gradient)
        if limit and busiest_share(routing) <= limit:
            return Choice("gathered", f"{why}; {measured}")
    return Choice("dense", f"{why}; the stock kernel computes all heads")


def worth_counting(routing: Routing) -> bool:
    """Whether the share of selected heads is known, or takes less time to count than skipping the others can save."""
    return routing.heads_per_group is not None or routing.selected_BNH.numel() >= MIN_COUNTED


def busiest_share(routing: Routing) -> float:
    """The share of the tokens that select the head which most of them select."""
    return float(routing.selected_BNH.float().mean(1).max())


def packed_share(q_BHND: Tensor, k_BKTD: Tensor, routing: Routing, attn_mask: Tensor | None) -> float | None:
    """The share of slots in a key-value group, where a router promised how many there are and a mask allows it."""
    heads, kv_heads = q_BHND.shape[1], k_BKTD.shape[1]
    count = routing.slots(kv_heads) if known(heads) and known(kv_heads) else None
    if count is None or (attn_mask is not None and attn_mask.shape[-3:-2] not in ((), (1,))):
        return None  # A mask that differs between heads would have to be gathered.
    return count * kv_heads / heads


def ruling_of(engine: str, q_BHND: Tensor, k_BKTD: Tensor, causal: bool, masked: bool, gradient: bool) -> Ruling:
    """Up to which share of the heads that engine is taken for arguments of these sizes, and why."""
    (_, _, queries, width), keys = q_BHND.shape, k_BKTD.shape[2]
    if torch.compiler.is_compiling():
        few = known(queries) and queries <= FEW_QUERIES and (not known(keys) or keys > queries)
        cache = few and not gradient
        what = What(q_BHND.dtype, gradient, causal and not masked and not cache, masked, cache)
        return ruling("attention", engine, what, width, keys if cache else queries)
    table = table_now("attention")
    digits = (queries.bit_length(), keys.bit_length())
    return ruling_of_class(table, engine, q_BHND.dtype, width, *digits, causal, masked, gradient)


@functools.lru_cache(maxsize=4096)
def ruling_of_class(
    table: Table,
    engine: str,
    dtype: torch.dtype,
    width: int,
    query_digits: int,
    key_digits: int,
    causal: bool,
    masked: bool,
    gradient: bool,
) -> Ruling:
    """The ruling for all numbers of queries and keys with so many binary digits: each call finds its own ready."""
    if query_digits == 0 or key_digits == 0:
        return 0.0, "there is nothing to compute"
    queries, keys = inside(query_digits), inside(key_digits)
    cache = queries <= FEW_QUERIES and keys > queries and not gradient
    # Under both masks the stock kernel skips nothing, as under the one; a query of a cache sees most of its keys.
    what = What(dtype, gradient, causal and not masked and not cache, masked, cache)
    return look_up(table, "attention", engine, what, width, keys if cache else queries, fused=False)


def wants_gradient(q: Tensor, k: Tensor, gates: Tensor) -> bool:
    """One by one: a loop takes longer than all the rest of a call's checks. Values learn where keys do."""
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or gates.requires_grad)


def on_device(q_BHND: Tensor, k_BKTD: Tensor, routing: Routing, attn_mask: Tensor | None) -> Choice:
    """The choice on a device that works ahead of the host, where nothing may be counted and nothing was measured."""
    share = packed_share(q_BHND, k_BKTD, routing, attn_mask)
    if share is not None and share <= SLOTS_MAX_SHARE and q_BHND.shape[2] >= SLOTS_MIN_QUERIES:
        return Choice("slots", f"every token uses {share:.0%} of the heads in each key-value group: they are packed")
    if q_BHND.shape[2] < TRITON_MIN_QUERIES:
        few = f"with {q_BHND.shape[2]} queries (fewer than {TRITON_MIN_QUERIES}) there is little to skip"
        return Choice("dense", few)
    if why := triton.refusal(q_BHND, attn_mask):
        return Choice("dense", f"{why}; counting selected heads would make the device wait for the host")
    return Choice("triton", "the Triton kernel skips heads that are not selected, without asking the host")
