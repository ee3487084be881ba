"""Times projections of selected heads against `F.linear` of all heads, in one process, taking turns.

    python benchmarks/projections.py
    python benchmarks/projections.py --dtype bfloat16 --cases vit small --impls cpu gathered auto

A cell holds, for each engine, the median over the pairs of (time of dense) / (time of ours): above 1, ours is faster.
The dense side is a bare `F.linear`: it neither zeroes nor gates. Outputs and gradients of every case are first compared
with the reference in float64, and a wrong result is not timed. CPU time with one thread survives a busy machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from page import Page, add_option
from torch import Tensor

from mixhead.ops import project_from_heads, project_to_heads, weight_by_head

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
Project = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes, and the shares of heads that are selected (random, but equally many for every token)."""

    tokens: int
    hidden: int
    heads: int
    head_dim: int
    shares: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)


CASES = {
    "vit": Case(8 * 197, 384, 6, 64),
    "small": Case(1024, 384, 6, 64),
    "medium": Case(1024, 1024, 16, 64),
    "long": Case(4096, 1024, 16, 64),
    "wide": Case(1024, 2048, 32, 64),
    "wide heads": Case(1024, 2048, 16, 128),
    "MoA": Case(512, 512, 8, 64, (0.25,)),
    "JetMoE": Case(1024, 2048, 8, 2048, (0.25,)),
}


@dataclass(frozen=True)
class Problem:
    """One direction: leaves (rows, weight as an nn.Linear has it, bias), the dense product and ours."""

    leaves: list[Tensor]
    dense: Project
    ours: Project  # takes the leaves and impl=


def problem(direction: str, case: Case, selected: Tensor, dtype: torch.dtype) -> Problem:
    batch, tokens, heads = selected.shape
    width = heads * case.head_dim
    if direction == "to heads":
        rows, weight = torch.randn(batch, tokens, case.hidden), torch.randn(width, case.hidden) / case.hidden**0.5
    else:
        rows, weight = torch.randn(batch, tokens, width), torch.randn(case.hidden, width) / width**0.5
    leaves = [t.to(dtype).requires_grad_() for t in (rows, weight, torch.randn(len(weight)))]

    def to_heads(rows: Tensor, weight: Tensor, bias: Tensor, impl: str) -> Tensor:
        by_head = (heads, case.head_dim)
        q = project_to_heads(rows, weight.unflatten(0, by_head), bias.unflatten(0, by_head), selected, impl=impl)
        return q.transpose(1, 2).flatten(2)

    def from_heads(rows: Tensor, weight: Tensor, bias: Tensor, impl: str) -> Tensor:
        out = rows.unflatten(-1, (heads, case.head_dim)).transpose(1, 2)
        return project_from_heads(out, weight_by_head(weight, heads), bias, selected, impl=impl)

    return Problem(leaves, F.linear, to_heads if direction == "to heads" else from_heads)


def wrong(this: Problem, impl: str, grad: Tensor) -> float:
    """The largest error of the output and the gradients, relative to the largest number of each."""

    def outcome(leaves: list[Tensor], grad: Tensor, impl: str) -> list[Tensor]:
        result = this.ours(*leaves, impl=impl)
        return [result.detach(), *torch.autograd.grad(result, leaves, grad)]

    expected = outcome([t.detach().double().requires_grad_() for t in this.leaves], grad.double(), "reference")
    actual = outcome(this.leaves, grad, impl)
    errors = [
        ((a - e).abs().max() / e.abs().max().clamp_min(1e-9)).item() for a, e in zip(actual, expected, strict=True)
    ]
    return max(errors)


def cell(case: Case, share: float, direction: str, args: argparse.Namespace) -> list[str]:
    """Ratios of the engines for forward, and for forward + backward."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    count = max(1, round(share * case.heads))
    chosen = torch.rand(1, case.tokens, case.heads).topk(count).indices
    selected = torch.zeros(1, case.tokens, case.heads, dtype=torch.bool).scatter(-1, chosen, True)
    this = problem(direction, case, selected, dtype)
    grad = torch.randn_like(this.dense(*this.leaves))

    def forward(project: Project, **kwargs: str) -> None:
        with torch.no_grad():
            project(*this.leaves, **kwargs)

    def both(project: Project, **kwargs: str) -> None:
        torch.autograd.grad(project(*this.leaves, **kwargs), this.leaves, grad)

    cells: list[list[str]] = [[], []]
    for impl in args.impls:
        error = wrong(this, impl, grad)
        for text, run in zip(cells, (forward, both), strict=True):
            text.append(f"{ratio(run, this, impl, args):.2f}" if error <= TOLERANCE[dtype] else f"WRONG ({error:.0e})")
    return [" / ".join(text) for text in cells]


def ratio(run: Callable[..., None], this: Problem, impl: str, args: argparse.Namespace) -> float:
    def seconds(times: int, project: Project, **kwargs: str) -> float:
        start = time.process_time()
        for _ in range(times):
            run(project, **kwargs)
        return (time.process_time() - start) / times

    seconds(1, this.ours, impl=impl)
    times = max(1, int(args.seconds / max(seconds(1, this.dense), 1e-6)))
    return statistics.median(
        seconds(times, this.dense) / seconds(times, this.ours, impl=impl) for _ in range(args.pairs)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--impls", nargs="+", default=["cpu", "gathered"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.02, help="least time of one measurement")
    add_option(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    good, shares = True, (1.0, 0.75, 0.5, 0.25)
    page = Page(
        "Projections of selected heads on the CPU against `F.linear` of all heads",
        ["case", *(f"{share:.0%} of heads" for share in shares)],
        f"{args.dtype}, one thread, CPU time, {args.pairs} pairs; cells: {' / '.join(args.impls)}.",
        args.write,
    )
    for name in args.cases:
        case = CASES[name]
        for direction in ("to heads", "from heads"):
            columns = [cell(case, share, direction, args) if share in case.shares else ["", ""] for share in shares]
            sizes = f"{direction}, {case.tokens} tokens, C = {case.hidden}, {case.heads} x {case.head_dim} ({name})"
            for what, row in zip(("forward", "forward + backward"), zip(*columns, strict=True), strict=True):
                good &= not any("WRONG" in text for text in row)
                page.add(f"{what} {sizes}", *row)
    page.close()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
