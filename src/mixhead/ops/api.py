"""`head_attention`: checks its arguments, picks an implementation, and says why.

The name is the mathematics, `impl` is the engine. An engine is one file with one function `attend`; a faster one comes
in by adding its file and a line to `IMPLEMENTATIONS`, and a reason to `explain`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.ops import cpu, crossover, dense, flex, gathered, reference, slots, triton
from mixhead.routing import Routing


class Attend(Protocol):
    """What an implementation is: checked arguments in, [B, H, N, D] out."""

    def __call__(
        self,
        q_BHND: Tensor,
        k_BKTD: Tensor,
        v_BKTD: Tensor,
        gates_BNH: Tensor,
        selected_BNH: Tensor,
        *,
        causal: bool,
        scale: float,
        attn_mask: Tensor | None,
    ) -> Tensor: ...


IMPLEMENTATIONS: dict[str, Attend] = {
    "reference": reference.attend,
    "dense": dense.attend,
    "gathered": gathered.attend,
    "cpu": cpu.attend,
    "slots": slots.attend,
    "triton": triton.attend,
    "flex": flex.attend,
}

# Measured with `mixhead bench core` on CPUs with AVX-512 (table in benchmarks/results): where gathering begins to
# beat the stock kernel on all heads, without a mask.
GATHER_MIN_QUERIES = 512
GATHER_MAX_SHARE = 0.7
# Likewise for packing heads into slots: measured with and without a gradient, causal or not, in float32 and bfloat16.
SLOTS_MIN_QUERIES = 512
SLOTS_MAX_SHARE = 0.5
# Not measured: below a block of queries there is nothing to gather.
TRITON_MIN_QUERIES = 128


@dataclass(frozen=True)
class Choice:
    """Which implementation runs, and why, in a sentence."""

    impl: str
    reason: str


def head_attention(
    q_BHND: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    routing: Routing,
    *,
    causal: bool = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of exactly the heads that each token selected, times their gates (MoH, arXiv 2410.11842, eq. 4).

    Args:
        q_BHND: queries of all heads; rows of heads that are not selected are never read into the result.
        k_BKTD: keys; K divides H, and each run of H / K query heads shares one key-value head.
        v_BKTD: values, of the same shape as the keys.
        routing: gates and selected heads, [B, N, H]. The gradient of a gate is defined at selected heads only.
        causal: a query sees the keys up to its own position; the last query sees the last key (N may differ from T).
        scale: factor of the scores; 1 / sqrt(D) by default.
        attn_mask: bool (True = may attend) or floating (added to the scores), broadcastable to [B, H, N, T].
        impl: "auto" or one of `IMPLEMENTATIONS`.

    Returns:
        [B, H, N, D] in the dtype of `q_BHND` (under autocast in its dtype, as from scaled_dot_product_attention): zero
        where a head is not selected or may attend to nothing.

    Raises:
        MixheadError: where shapes, dtypes, devices or the name of the implementation do not fit, or where the
            implementation that was asked for cannot take these arguments here (see `refusal`). Only "cpu" never
            refuses: where the C++ kernel cannot run, its portable form does, "gathered".
    """
    if not isinstance(routing, Routing):
        raise MixheadError(f"routing must be a mixhead.Routing, got {type(routing).__name__}; see Routing.from_gates.")
    if impl == "auto" and attn_mask is None and kernel_at_once(q_BHND, k_BKTD, v_BKTD, routing):
        try:
            return run("cpu", q_BHND, k_BKTD, v_BKTD, routing, causal, scale, None)
        except RuntimeError:
            pass  # Refused, since sizes do not fit or are 0: what a user is told, or gets, is decided below.
    q_BHND, k_BKTD, v_BKTD = autocast_together(q_BHND, k_BKTD, v_BKTD)
    check_arguments(q_BHND, k_BKTD, v_BKTD, routing, attn_mask)
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        attn_mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(q_BHND.dtype)
    if impl == "auto":
        impl = choose(q_BHND, k_BKTD, routing, causal, attn_mask)
    elif impl not in IMPLEMENTATIONS:
        raise MixheadError(f"impl={impl!r} is unknown: choose 'auto' or one of {', '.join(IMPLEMENTATIONS)}.")
    elif q_BHND.numel() == 0 or k_BKTD.numel() == 0:
        impl = "reference"  # Nothing to compute; kernels may refuse sizes of 0.
    elif why := refusal(impl, q_BHND, k_BKTD, v_BKTD, routing, attn_mask):
        if impl != "cpu":
            raise MixheadError(f"impl={impl!r} cannot take these arguments: {why}.")
        impl = "gathered"
    return run(impl, q_BHND, k_BKTD, v_BKTD, routing, causal, scale, attn_mask)


def kernel_at_once(q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing) -> bool:
    """Whether without a mask `auto` takes the C++ kernel whatever the sizes: it is loaded, and pays by default.

    Asked first in every call, because all other questions together take as long as the attention of one token.
    """
    return routing.gates_BNH.is_cpu and routing.selected_BNH.is_cpu and kernel_pays(q_BHND, k_BKTD, v_BKTD)


def kernel_pays(q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> bool:
    """The same, whatever the routing."""
    return (
        not torch.compiler.is_compiling()
        and cpu.is_default(q_BHND)
        and k_BKTD.is_cpu
        and v_BKTD.is_cpu
        and not cpu.transformed()
        and not torch.is_autocast_enabled("cpu")
        and crossover.load(torch.get_num_threads()) is None
    )


def run(
    impl: str,
    q_BHND: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    routing: Routing,
    causal: bool,
    scale: float | None,
    attn_mask: Tensor | None,
) -> Tensor:
    """That implementation, with what a user may leave out."""
    attend, gates_BNH, dtype = IMPLEMENTATIONS[impl], routing.gates_BNH, q_BHND.dtype
    if impl == "slots":
        attend = partial(slots.attend, heads_per_group=routing.slots(k_BKTD.shape[1]))
    return attend(
        q_BHND,
        k_BKTD,
        v_BKTD,
        gates_BNH if gates_BNH.dtype == dtype else gates_BNH.to(dtype),
        routing.selected_BNH,
        causal=causal,
        scale=(q_BHND.shape[-1] or 1) ** -0.5 if scale is None else scale,
        attn_mask=attn_mask,
    )


def refusal(
    impl: str, q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing, attn_mask: Tensor | None = None
) -> str | None:
    """Why that implementation cannot take these arguments, in a sentence; None where it can."""
    if impl == "cpu":
        return cpu.refusal(q_BHND, attn_mask)
    if impl == "slots":
        kv_heads = k_BKTD.shape[1]
        return slots.refusal(routing.selected_BNH, kv_heads, routing.slots(kv_heads))
    if impl == "triton":
        return triton.refusal(q_BHND, attn_mask)
    if impl == "flex":
        return flex.refusal(q_BHND, k_BKTD, v_BKTD, attn_mask)
    return None


def choose(q_BHND: Tensor, k_BKTD: Tensor, routing: Routing, causal: bool, attn_mask: Tensor | None) -> str:
    """The implementation that `explain` names, without its sentence, which takes as long as a short attention."""
    if q_BHND.device.type == "cpu" and q_BHND.numel() and k_BKTD.numel():
        known = crossover_known(q_BHND, k_BKTD, routing, causal)
        if kernel_runs(q_BHND, k_BKTD, attn_mask, known):
            return "cpu"
    return explain(q_BHND, k_BKTD, routing, causal=causal, attn_mask=attn_mask).impl


def crossover_known(q_BHND: Tensor, k_BKTD: Tensor, routing: Routing, causal: bool) -> bool | None:
    """Whether the C++ kernel was measured to be faster on this machine; None where that is not known."""
    if torch.compiler.is_compiling():
        return None
    return crossover.measured(q_BHND, k_BKTD, routing.selected_BNH, causal)


def kernel_runs(q_BHND: Tensor, k_BKTD: Tensor, attn_mask: Tensor | None, known: bool | None) -> bool:
    """Whether the C++ kernel pays and can run: asked in this order, so that it is only built where it pays."""
    return (cpu.pays(q_BHND, k_BKTD) if known is None else known) and cpu.refusal(q_BHND, attn_mask) is None


def explain(
    q_BHND: Tensor, k_BKTD: Tensor, routing: Routing, *, causal: bool = False, attn_mask: Tensor | None = None
) -> Choice:
    """Which implementation `impl="auto"` takes for these arguments, and why."""
    if q_BHND.numel() == 0 or k_BKTD.numel() == 0:
        return Choice("reference", "there is nothing to compute: there are no queries or no keys")
    if q_BHND.device.type != "cpu":
        return packed(q_BHND, k_BKTD, routing, attn_mask) or explain_device(q_BHND, attn_mask)
    if cpu.transformed():
        return Choice("reference", "torch.func and forward-mode derivatives need the plain operations of PyTorch")
    known = crossover_known(q_BHND, k_BKTD, routing, causal)
    if not (cpu.pays(q_BHND, k_BKTD) if known is None else known):
        return explain_portable(q_BHND, k_BKTD, routing, causal, attn_mask, known)
    if why := cpu.refusal(q_BHND, attn_mask):
        choice = explain_portable(q_BHND, k_BKTD, routing, causal, attn_mask, None)
        return Choice(choice.impl, f"{why}; {choice.reason}")
    basis = "default" if known is None else "measured on this machine"
    return Choice("cpu", f"at this size the C++ kernel is faster than the stock one ({basis})")


def explain_portable(
    q_BHND: Tensor, k_BKTD: Tensor, routing: Routing, causal: bool, attn_mask: Tensor | None, known: bool | None
) -> Choice:
    """The choice on a CPU among what is written in PyTorch; `known` is False where the kernel was measured slower."""
    if (choice := packed(q_BHND, k_BKTD, routing, attn_mask)) is not None:
        return choice
    if torch.compiler.is_compiling():
        return Choice("dense", "torch.compile needs static shapes, and the stock kernel has them")
    if causal or attn_mask is not None:
        return Choice("dense", "under a mask the stock kernel on all heads is faster than gathered queries")
    if q_BHND.shape[2] < GATHER_MIN_QUERIES:
        fewer = f"with {q_BHND.shape[2]} queries (fewer than {GATHER_MIN_QUERIES}) gathering does not pay"
        return Choice(
            "dense", fewer if known is None else "at this size the stock kernel is faster (measured on this machine)"
        )
    largest_share = float(routing.selected_BNH.float().mean(1).max())
    if largest_share > GATHER_MAX_SHARE:
        return Choice("dense", f"one head is selected by {largest_share:.0%} of the tokens, so gathering does not pay")
    return Choice("gathered", f"the busiest head is selected by {largest_share:.0%} of the tokens: the rest is skipped")


def packed(q_BHND: Tensor, k_BKTD: Tensor, routing: Routing, attn_mask: Tensor | None) -> Choice | None:
    """Slots, where the router promised a number of them that pays; nothing is counted."""
    heads, kv_heads = q_BHND.shape[1], k_BKTD.shape[1]
    count, group = routing.slots(kv_heads), heads // kv_heads
    if count is None or count > SLOTS_MAX_SHARE * group or q_BHND.shape[2] < SLOTS_MIN_QUERIES:
        return None
    if attn_mask is not None and attn_mask.shape[-3:-2] not in ((), (1,)):
        return None  # A mask that differs between heads would have to be gathered.
    return Choice(
        "slots",
        f"every token uses {count} of {group} heads in each key-value group: the stock kernel runs on "
        f"{count * kv_heads} heads instead of {heads}",
    )


def explain_device(q_BHND: Tensor, attn_mask: Tensor | None) -> Choice:
    """The choice on a device that works ahead of the host, where nothing may be counted."""
    if q_BHND.shape[2] < TRITON_MIN_QUERIES:
        few = f"with {q_BHND.shape[2]} queries (fewer than {TRITON_MIN_QUERIES}) there is little to skip"
        return Choice("dense", few)
    if why := triton.refusal(q_BHND, attn_mask):
        return Choice("dense", f"{why}; counting selected heads would make the device wait for the host")
    return Choice("triton", "the Triton kernel skips heads that are not selected, without asking the host")


def check_arguments(q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing, attn_mask: Tensor | None) -> None:
    """Raises a `MixheadError` that names the argument, the expected shape and the one received."""
    # Shapes are asked for once: each costs as much as the rest of a check.
    q_shape, k_shape, v_shape = q_BHND.shape, k_BKTD.shape, v_BKTD.shape
    for name, tensor, shape in (("q_BHND", q_BHND, q_shape), ("k_BKTD", k_BKTD, k_shape), ("v_BKTD", v_BKTD, v_shape)):
        if len(shape) != 4:
            raise MixheadError(f"{name} must have 4 dimensions [batch, heads, tokens, head_dim], got {list(shape)}.")
        if tensor.dtype != q_BHND.dtype:
            raise MixheadError(f"{name} is {tensor.dtype}, but q_BHND is {q_BHND.dtype}: they must have one dtype.")
    if not q_BHND.is_floating_point():
        raise MixheadError(f"q_BHND, k_BKTD and v_BKTD must be floating point, got {q_BHND.dtype}.")
    check_devices(q_BHND, k_BKTD, v_BKTD, routing, attn_mask)
    batch, heads, queries, head_dim = q_shape
    _, kv_heads, keys, _ = k_shape
    if k_shape != (batch, kv_heads, keys, head_dim) or kv_heads == 0 or heads % kv_heads:
        raise MixheadError(
            f"k_BKTD must be [{batch}, K, T, {head_dim}] with K dividing the {heads} query heads, got {list(k_shape)}."
        )
    if v_shape != k_shape:
        raise MixheadError(f"v_BKTD must have the shape of k_BKTD, {list(k_shape)}, got {list(v_shape)}.")
    gates_BNH, selected_BNH, of_routing = routing.gates_BNH, routing.selected_BNH, (batch, queries, heads)
    if gates_BNH.shape != of_routing:
        raise MixheadError(f"routing.gates_BNH must be {list(of_routing)}, got {list(gates_BNH.shape)}.")
    if selected_BNH.shape != of_routing:
        raise MixheadError(f"routing.selected_BNH must be {list(of_routing)}, got {list(selected_BNH.shape)}.")
    if selected_BNH.dtype != torch.bool:
        raise MixheadError(f"routing.selected_BNH must be torch.bool, got {selected_BNH.dtype}.")
    if attn_mask is None:
        return
    if not broadcasts_to(attn_mask.shape, (batch, heads, queries, keys)):
        raise MixheadError(
            f"attn_mask must broadcast to [{batch}, {heads}, {queries}, {keys}], got {list(attn_mask.shape)}."
        )
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise MixheadError(
            "attn_mask must be torch.bool (True = may attend) or floating point (added to the scores), "
            f"got {attn_mask.dtype}."
        )


def check_devices(q_BHND: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, routing: Routing, attn_mask: Tensor | None) -> None:
    """Raises where the arguments are not all on one device: a kernel would read what is not there."""
    device, others = q_BHND.device, {"k_BKTD": k_BKTD, "v_BKTD": v_BKTD, "attn_mask": attn_mask}
    others |= {"routing.gates_BNH": routing.gates_BNH, "routing.selected_BNH": routing.selected_BNH}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise MixheadError(f"{name} is on {tensor.device}, but q_BHND is on {device}: they must be on one device.")


def autocast_together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast all in its dtype, as scaled_dot_product_attention takes them; without it they stay as they are.

    A rotary embedding may have brought queries and keys back to float32 where the values are in half precision.
    """
    device_type = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def broadcasts_to(shape: torch.Size, target: tuple[int, ...]) -> bool:
    """Whether a tensor of `shape` can be expanded to `target`."""
    padded = (1,) * (len(target) - len(shape)) + tuple(shape)
    return len(padded) == len(target) and all(a in (1, b) for a, b in zip(padded, target, strict=True))
