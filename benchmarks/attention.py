"""Times the attention core against `F.scaled_dot_product_attention` on all heads, in one process, taking turns.

    python benchmarks/attention.py
    python benchmarks/attention.py --set long --dtype bfloat16 --pairs 9 --clock wall --threads 2

A cell is the median over the pairs of (time of dense) / (time of ours): above 1, ours is faster. Every case is first
compared with the reference in float64, and a wrong result is not timed. CPU time with one thread survives a busy
machine; the wall clock wants an idle one.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixhead.ops import head_attention, reference
from mixhead.routing import Routing

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case:
    batch: int
    tokens: int
    causal: bool
    backward: bool = False
    keys: int | None = None
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 64

    def __str__(self) -> str:
        direction = "forward + backward" if self.backward else "forward"
        size = f"{self.batch} x {self.tokens}" + (f" of {self.keys}" if self.keys else "")
        grouped = f", {self.heads}/{self.kv_heads} heads" if self.heads != self.kv_heads else ""
        return f"{direction}, {size}{grouped}, {'causal' if self.causal else 'bidirectional'}"


QUICK = [
    Case(8, 197, False),
    Case(1, 1024, False),
    Case(1, 1024, True),
    Case(8, 197, False, backward=True),
    Case(1, 1024, False, backward=True),
    Case(1, 1024, True, backward=True),
]
LONG = [
    Case(1, 4096, False),
    Case(1, 4096, True),
    Case(1, 4096, True, heads=32, kv_heads=8),
    Case(1, 4096, False, backward=True),
    Case(1, 4096, True, backward=True),
]
SMALL = [
    Case(b, n, c) for b, n in ((1, 16), (1, 32), (1, 64), (1, 128), (8, 32), (64, 16), (64, 64)) for c in (False, True)
]
DECODE = [
    Case(1, 1, True, keys=4096, heads=32, kv_heads=32, head_dim=128),
    Case(1, 1, True, keys=4096, heads=32, kv_heads=8, head_dim=128),
    Case(1, 4, True, keys=4096, heads=32, kv_heads=8, head_dim=128),
    Case(8, 1, True, keys=1024),
    Case(8, 1, True, keys=1024, heads=32, kv_heads=8, head_dim=128),
    *(Case(1, 1, True, keys=keys) for keys in (16, 64, 256)),
]


def selection(case: Case, share: float, kind: str) -> Tensor:
    """bool [B, N, H]: every head taken by `share` of the tokens; or one by 90%, one by 10%, the others alike."""
    if share >= 1:
        return torch.ones(case.batch, case.tokens, case.heads, dtype=torch.bool)
    shares_H = torch.full((case.heads,), share)
    if kind == "skewed":
        shares_H[0], shares_H[1] = 0.9, 0.1
        shares_H[2:] = (share * case.heads - 1.0) / (case.heads - 2)
    return torch.rand(case.batch, case.tokens, case.heads) < shares_H


def wrong(case: Case, q: Tensor, k: Tensor, v: Tensor, routing: Routing, impl: str) -> float:
    """The largest error of one key-value head's outputs and gradients, relative to the largest number."""
    groups = case.heads // case.kv_heads
    grad = torch.randn_like(q)

    def outcome(
        attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, gates: Tensor, grad: Tensor
    ) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(case.backward) for t in (q, k, v, gates)]
        out = attend(*leaves)
        return [out.detach(), *(torch.autograd.grad(out, leaves, grad) if case.backward else ())]

    def ours(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        return head_attention(q, k, v, Routing(gates, routing.selected_BNH), causal=case.causal, impl=impl)

    def exact(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        selected = routing.selected_BNH[..., :groups]
        return reference.attend(q, k, v, gates, selected, causal=case.causal, scale=case.head_dim**-0.5, attn_mask=None)

    one = (q[:, :groups], k[:, :1], v[:, :1], routing.gates_BNH[..., :groups], grad[:, :groups])
    expected = outcome(exact, *(t.double() for t in one))
    actual = outcome(ours, q, k, v, routing.gates_BNH, grad)
    pieces = [actual[0][:, :groups]]
    if case.backward:
        pieces += [actual[1][:, :groups], actual[2][:, :1], actual[3][:, :1], actual[4][..., :groups]]
        expected[4] = expected[4] * routing.selected_BNH[..., :groups]
    return max(
        ((a - e).abs().max() / e.abs().max().clamp_min(1e-9)).item() for a, e in zip(pieces, expected, strict=True)
    )


def ratio(case: Case, share: float, args: argparse.Namespace) -> str:
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)

    def tensor(heads: int, tokens: int) -> Tensor:
        if args.layout == "by-token":  # as they come from the projections
            return torch.randn(case.batch, tokens, heads, case.head_dim).to(dtype).transpose(1, 2)
        return torch.randn(case.batch, heads, tokens, case.head_dim).to(dtype)

    keys = case.keys or case.tokens
    q, k, v = tensor(case.heads, case.tokens), tensor(case.kv_heads, keys), tensor(case.kv_heads, keys)
    selected = selection(case, share, args.routing)
    routing = Routing((0.5 + torch.rand(selected.shape)).to(dtype) * selected, selected)
    error = wrong(case, q, k, v, routing, args.impl)
    if not error <= TOLERANCE[dtype]:
        return f"WRONG ({error:.1e})"
    grad = torch.randn_like(q)
    leaves = [t.requires_grad_(case.backward) for t in (q, k, v)]
    stock_causal = case.causal and case.tokens == keys

    def dense() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=stock_causal, enable_gqa=case.heads != case.kv_heads)
        if case.backward:
            torch.autograd.grad(out, leaves, grad)

    def ours() -> None:
        out = head_attention(q, k, v, routing, causal=case.causal, impl=args.impl)
        if case.backward:
            torch.autograd.grad(out, leaves, grad)

    clock = time.process_time if args.clock == "cpu" else time.perf_counter

    def seconds(run: Callable[[], None], times: int) -> float:
        start = clock()
        for _ in range(times):
            run()
        return (clock() - start) / times

    dense(), ours()
    times = max(1, int(args.seconds / max(seconds(dense, 1), 1e-6)))
    pairs = [(seconds(dense, times), seconds(ours, times)) for _ in range(args.pairs)]
    middle = statistics.median(d / o for d, o in pairs)
    return f"{middle:.2f} ({statistics.median(o for _, o in pairs) * 1e3:.3g} ms)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=["quick", "long", "small", "decode"], default="quick")
    parser.add_argument("--impl", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.75, 0.5, 0.25])
    parser.add_argument("--routing", choices=["random", "skewed"], default="random")
    parser.add_argument("--layout", choices=["by-head", "by-token"], default="by-head")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.02, help="least time of one measurement")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = {"quick": QUICK, "long": LONG, "small": SMALL, "decode": DECODE}[args.set]
    print(f"{args.impl}, {args.dtype}, {args.routing} routing, {args.layout}, {args.threads} thr., {args.clock} time")
    print(f"torch {torch.__version__}, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}\n")
    print(f"| case | {' | '.join(f'{share:.0%} of heads' for share in args.shares)} |")
    print(f"|---|{'---|' * len(args.shares)}")
    good = True
    for case in cases:
        cells = [ratio(case, share, args) for share in args.shares]
        good &= not any("WRONG" in cell for cell in cells)
        print(f"| {case} | {' | '.join(cells)} |", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
