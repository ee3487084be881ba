"""Times mixture of attention heads against the loop form of the papers' code, and JetMoE against transformers.

    python benchmarks/moa.py                      # one thread, CPU time: survives a busy machine
    python benchmarks/moa.py --threads 2          # two threads, wall time: wants an idle one

Both sides of a row have the same weights, run in one process and take turns; a cell is the median over the pairs of
(time of theirs) / (time of ours), above 1 is faster, and beside it the median times. Outputs and gradients are compared
first, and a wrong result is not timed. "Products alone" is the time of nothing but the matrix products that the
attention consists of, at the same sizes, as a share of our time: what no operator can save.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from moa_yardsticks import LoopAttention
from page import Page, add_option
from torch import Tensor, nn
from transformers import JetMoeConfig
from transformers.models.jetmoe.modeling_jetmoe import JetMoeAttention, JetMoeRotaryEmbedding

from mixhead.bench.timing import Call, race, ratio, threads
from mixhead.models.jetmoe import replace
from mixhead.nn import MixtureOfAttentionHeads

TOLERANCE = 2e-5  # of the largest number of each output and gradient
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Contest:
    """Two ways to compute the same outputs from the same leaves, and the products that both consist of."""

    name: str
    leaves: list[Tensor]
    theirs: Callable[[], Outputs]
    ours: Callable[[], Outputs]
    products: list[tuple[int, int, int, int]]  # (count, rows, depth, columns)


def moa(batch: int, tokens: int, dim: int, experts: int, top_k: int, head_dim: int) -> Contest:
    """The MoA layer with its losses, self-attention without a mask."""
    layer = MixtureOfAttentionHeads(dim, experts, top_k, head_dim)
    nn.init.normal_(layer.router.gate_proj.weight, std=dim**-0.5)
    loop = LoopAttention(layer)
    x = torch.randn(batch, tokens, dim, requires_grad=True)

    def ours() -> Outputs:
        y, routing = layer(x)
        return y, routing.aux_loss

    rows = batch * tokens
    return Contest(
        f"MoA, {batch} x {tokens} tokens, d = {dim}, {top_k} of {experts} experts, D = {head_dim}",
        [x, *layer.parameters()],
        lambda: loop(x),
        ours,
        [
            (2, rows * top_k, dim, head_dim),
            (1, rows, dim, 2 * head_dim),
            (2 * batch, top_k * tokens, head_dim, tokens),
        ],
    )


def jetmoe(tokens: int) -> Contest:
    """The attention of JetMoE-8B, causal, against the module of transformers with SDPA."""
    config = JetMoeConfig(attn_implementation="sdpa")
    theirs, ours = (JetMoeAttention(config, 0) for _ in range(2))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=config.hidden_size**-0.5)
    for name, parameter in theirs.named_parameters():  # Both hold the very same weights.
        owner, _, last = name.rpartition(".")
        setattr(ours.get_submodule(owner), last, parameter)
    for module in [*ours.modules()]:
        replace(module)
    x = torch.randn(1, tokens, config.hidden_size, requires_grad=True)
    positions = JetMoeRotaryEmbedding(config)(x, torch.arange(tokens).unsqueeze(0))
    size, heads, head_dim = config.hidden_size, config.num_attention_heads, config.kv_channels
    width = config.num_key_value_heads * head_dim
    return Contest(
        f"JetMoE attention, {tokens} tokens, {size} wide, {config.num_experts_per_tok} of {config.num_local_experts}",
        [x, *theirs.parameters()],
        lambda: theirs(x, position_embeddings=positions)[:1],
        lambda: ours(x, position_embeddings=positions)[:1],
        [
            (2, tokens * config.num_experts_per_tok, size, width),
            (1, tokens, size, 2 * width),
            (heads, tokens, head_dim, tokens),  # two products of which causal attention needs half
        ],
    )


def gradients(contest: Contest, run: Callable[[], Outputs], sent: Outputs) -> Outputs:
    """The gradients of all outputs, each multiplied by what a later layer would send back."""
    return torch.autograd.grad(run(), contest.leaves, sent)


def sent_back(contest: Contest) -> Outputs:
    """Gradients of the outputs."""
    with torch.no_grad():
        return tuple(torch.randn_like(output) for output in contest.theirs())


def worst_error(contest: Contest) -> float:
    """The largest difference of outputs and gradients, relative to the largest number of each."""
    sent = sent_back(contest)
    theirs, ours = (run() + gradients(contest, run, sent) for run in (contest.theirs, contest.ours))
    pairs = zip(theirs, ours, strict=True)
    return max(((a - b).abs().max() / a.abs().max().clamp_min(1e-12)).item() for a, b in pairs)


def products_alone(contest: Contest, backward: bool) -> Call:
    """Nothing but the matrix products: with gradients each of them thrice."""
    operands = [(count, torch.randn(m, k), torch.randn(k, n)) for count, m, k, n in contest.products]

    def run() -> None:
        for count, a, b in operands:
            c = torch.empty(a.shape[0], b.shape[1])
            for _ in range(count):
                torch.mm(a, b, out=c)
                if backward:
                    torch.mm(c, b.t())
                    torch.mm(a.t(), c)

    return run


def row(contest: Contest, backward: bool, args: argparse.Namespace) -> list[str]:
    """A row of the table."""
    sent = sent_back(contest)

    def call(run: Callable[[], Outputs]) -> Call:
        def forward() -> None:
            with torch.no_grad():
                run()

        return (lambda: gradients(contest, run, sent)) if backward else forward

    calls = [call(contest.theirs), call(contest.ours), products_alone(contest, backward)]
    theirs, ours, products = race(calls, args.pairs, args.seconds)
    times = ratio(theirs, ours)
    clock = "cpu" if args.threads == 1 else "wall"
    milliseconds = [getattr(t, f"{clock}_ms") for t in (theirs, ours)]
    share = statistics.median(getattr(products, clock)) * 1e3 / milliseconds[1]
    what = "forward + backward" if backward else "forward"
    return [contest.name, what, f"{getattr(times, clock):.2f}", *(f"{ms:.1f}" for ms in milliseconds), f"{share:.0%}"]


CONTESTS: dict[str, Callable[[], Contest]] = {
    "moa": lambda: moa(1, 512, 512, 8, 2, 64),
    "moa-batch": lambda: moa(16, 512, 512, 8, 2, 64),  # the 8,192 tokens of a batch in the published recipe
    "jetmoe": lambda: jetmoe(1024),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contests", nargs="+", choices=list(CONTESTS), default=list(CONTESTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.1, help="least time of one measurement")
    add_option(parser)
    args = parser.parse_args(arguments)
    clock = "CPU time" if args.threads == 1 else "wall time"
    page = Page(
        "Mixture of attention heads against its loop form, and JetMoE's attention against transformers",
        ["layer", "what", "theirs / ours", "theirs, ms", "ours, ms", "products alone, of ours"],
        f"float32, {args.threads} thread(s), {clock}, {args.pairs} pairs.",
        args.write,
    )
    good = True
    with threads(args.threads):
        for name in args.contests:
            torch.manual_seed(0)
            contest = CONTESTS[name]()
            error = worst_error(contest)
            if error > TOLERANCE:
                page.add(contest.name, f"WRONG: the largest relative error is {error:.0e}", "", "", "", "")
                good = False
                continue
            for backward in (False, True):
                page.add(*row(contest, backward, args))
    page.close()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
