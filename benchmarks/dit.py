"""Times whole MoH-DiTs against the dense DiT of the same size at 64 x 64 pixels in patches of 2: 1,024 tokens.

    python benchmarks/dit.py                         # one thread; CPU time, which survives a busy machine
    python benchmarks/dit.py --threads 2 --rounds 5  # on a quiet machine; wall time

A cell is the median over the rounds of (time of dense) / (time of MoH), measured in one process, taking turns: above 1,
MoH is faster. A sampling step is one step of DDIM for one image, everything included; a training step is forward and
backward with the balance loss. Dense is the stock `scaled_dot_product_attention` on all heads. Output and gradients of
every attention layer are first compared with those of all heads times their gates, and a wrong model is not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from diffusers import DDIMScheduler
from page import Page, add_option

from mixhead.bench.timing import race, ratio, threads
from mixhead.models.moh_dit import MoHDiT, MoHDiTConfig, denoise
from mixhead.nn import MixtureOfHeadAttention
from mixhead.routing import mean_balance_loss

SIZE = {"sample_size": 64, "in_channels": 3, "num_classes": 10}
TOLERANCE = 1e-4


EMOJI = {"hidden_size": 128, "depth": 4, "num_heads": 4}  # the small model of the recipe `emoji-moh-dit`


def models(size: str) -> dict[str, MoHDiT]:
    """The dense model first, then shares of its heads (for S and B the published ones), last half of every layer."""
    if size == "emoji":
        dense = MoHDiTConfig(**SIZE, **EMOJI)
        shares = {"75%": replace(dense, shared_heads=2, top_k=1), "50%": replace(dense, shared_heads=1, top_k=1)}
    else:
        dense = MoHDiTConfig.named(f"dit-{size}", **SIZE)
        half = dense.layers[0].num_heads // 2
        published = {f"{share}%": MoHDiTConfig.named(f"moh-dit-{size}-{share}", **SIZE) for share in (90, 75)}
        shares = {**published, "50%": replace(dense, shared_heads=half // 3, top_k=half - half // 3)}
    return {name: random_model(config) for name, config in {"dense": dense, **shares}.items()}


def random_model(config: MoHDiTConfig) -> MoHDiT:
    """Weights as a trained model may have them: at the published initialisation the blocks are the identity."""
    model = MoHDiT(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.count_nonzero():
            torch.nn.init.normal_(module.weight, std=0.02)
    return model


def batch(model: MoHDiT) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    side = model.config.sample_size
    x = torch.randn(1, model.config.in_channels, side, side, generator=generator)
    return x, torch.tensor([500]), torch.tensor([3])


def sample(model: MoHDiT) -> torch.Tensor:
    """One step of DDIM."""
    return denoise(model, DDIMScheduler(), batch(model)[0], [3], num_inference_steps=1)


def train(model: MoHDiT) -> None:
    """Forward and backward."""
    model.zero_grad(set_to_none=True)
    output, routings = model(*batch(model), return_routing=True)
    balance = mean_balance_loss(routings)
    loss = output.square().mean() + (0.0 if balance is None else 0.01 * balance)
    loss.backward()


def error(model: MoHDiT) -> float:
    """The largest error of any attention layer: of output and gradients, relative to the largest number of each.

    Layer by layer on the same input: over a whole model, rounding changes the choice of a head here and there.
    """
    seen: list[tuple[MixtureOfHeadAttention, torch.Tensor]] = []
    hooks = [
        attention.register_forward_pre_hook(lambda module, arguments: seen.append((module, arguments[0])))
        for _, attention in model.named_attention()
    ]
    sample(model)
    for hook in hooks:
        hook.remove()
    return max(layer_error(attention, hidden) for attention, hidden in seen)


def layer_error(attention: MixtureOfHeadAttention, hidden: torch.Tensor) -> float:
    found = []
    for attend in (all_heads_with_gates, lambda attention, hidden: attention(hidden)):
        leaf = hidden.clone().requires_grad_()
        output = attend(attention, leaf)
        gradients = torch.autograd.grad(
            output, [leaf, *attention.parameters()], torch.ones_like(output).cumsum(-1) / output.shape[-1]
        )
        # All weights as one: some gradients are 0 up to rounding (a bias of the keys, the scores for one head).
        found.append([output.detach(), gradients[0], torch.cat([g.flatten() for g in gradients[1:]])])
    return max(float((a - e).abs().max() / e.abs().max()) for e, a in zip(*found, strict=True))


def all_heads_with_gates(attention: MixtureOfHeadAttention, hidden: torch.Tensor) -> torch.Tensor:
    """What a routed layer computes, with every head computed and most of them multiplied by 0."""
    gates = attention.router(hidden).gates_BNH
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (p(hidden).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for p in projections)
    heads = torch.nn.functional.scaled_dot_product_attention(q, k, v) * gates.transpose(1, 2).unsqueeze(-1)
    return attention.o_proj(heads.transpose(1, 2).flatten(2))


def row(step: str, size: str, calls: dict[str, Callable[[], object]], args: argparse.Namespace) -> list[str]:
    """Milliseconds of the dense model, and how many times faster the others are: a row of the table."""
    times = dict(zip(calls, race(list(calls.values()), args.rounds, seconds=0.1), strict=True))
    clock = "cpu" if args.threads == 1 else "wall"
    cells = [f"{getattr(times['dense'], f'{clock}_ms'):.0f} ms"]
    for share in ("90%", "75%", "50%"):
        cells.append(f"{getattr(ratio(times['dense'], times[share]), clock):.2f}" if share in times else "")
    return [f"{size}/2", step, *cells]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=["emoji", "s", "b"], default=["emoji", "s"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-training", action="store_true", help="time sampling only")
    add_option(parser)
    args = parser.parse_args()
    torch.manual_seed(0)
    clock = "CPU" if args.threads == 1 else "wall"
    page = Page(
        "Whole MoH-DiTs against the dense DiT of the same size",
        ["model, 1,024 tokens", "step", "dense", "90%", "75%", "50% of heads"],
        f"{args.threads} thread(s), {clock} time.",
        args.write,
    )
    with threads(args.threads):
        for size in args.sizes:
            compared = models(size)
            wrong = {name: off for name, m in compared.items() if name != "dense" and (off := error(m)) > TOLERANCE}
            if wrong:
                print(f"WRONG, so not timed: {wrong}")
                return 1
            for step in (sample,) if args.no_training else (sample, train):
                calls = {name: partial(step, model) for name, model in compared.items()}
                page.add(*row(step.__name__, size, calls, args))
    page.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
