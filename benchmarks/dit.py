"""Times whole MoH-DiTs against the dense DiT of the same size at 64 x 64 pixels in patches of 2: 1,024 tokens.

    python benchmarks/dit.py                         # one thread; CPU time, which survives a busy machine
    python benchmarks/dit.py --threads 2 --rounds 5  # on a quiet machine; wall time

A cell is the median over the rounds of (time of dense) / (time of MoH), measured in one process, taking turns: above 1,
MoH is faster. A sampling step is one step of DDIM for one image, everything included; a training step is forward and
backward with the balance loss. Dense is the stock `scaled_dot_product_attention` on all heads. Outputs and gradients of
every model are first compared with those of the masked reference, and a wrong one is not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from diffusers import DDIMScheduler

from mixhead.bench.results import describe_machine
from mixhead.bench.timing import race, ratio, threads
from mixhead.models.moh_dit import MoHDiT, MoHDiTConfig, denoise
from mixhead.routing import mean_balance_loss

SIZE = {"sample_size": 64, "in_channels": 3, "num_classes": 10}
TOLERANCE = 1e-4


def models(size: str) -> dict[str, MoHDiT]:
    """The dense model first, then the published shares of heads, then half of the heads in every layer."""
    half = MoHDiTConfig.named(f"dit-{size}").layers[0].num_heads // 2
    configs = {
        "dense": MoHDiTConfig.named(f"dit-{size}", **SIZE),
        "90%": MoHDiTConfig.named(f"moh-dit-{size}-90", **SIZE),
        "75%": MoHDiTConfig.named(f"moh-dit-{size}-75", **SIZE),
        "50%": MoHDiTConfig.named(f"dit-{size}", **SIZE, shared_heads=half // 3, top_k=half - half // 3),
    }
    return {name: random_model(config) for name, config in configs.items()}


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


def train(model: MoHDiT, impl: str = "auto") -> torch.Tensor:
    """Forward and backward; the output."""
    model.zero_grad(set_to_none=True)
    output, routings = model(*batch(model), return_routing=True, impl=impl)
    balance = mean_balance_loss(routings)
    loss = output.square().mean() + (0.0 if balance is None else 0.01 * balance)
    loss.backward()
    return output.detach()


def error(model: MoHDiT) -> float:
    """The largest error of the output and of any gradient, relative to the largest number of each in the reference."""
    found = []
    for impl in ("reference", "auto"):
        output = train(model, impl)
        found.append([output, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    return max(float((a - e).abs().max() / e.abs().max().clamp(min=1e-9)) for e, a in zip(*found, strict=True))


def measure(calls: list[Callable[[], object]], args: argparse.Namespace) -> list[str]:
    """Milliseconds of the first call, and how many times faster the others are."""
    times = race(calls, args.rounds, seconds=0.1)
    clock = "cpu" if args.threads == 1 else "wall"
    faster = [f"**{getattr(ratio(times[0], other), clock):.2f}**" for other in times[1:]]
    return [f"{getattr(times[0], f'{clock}_ms'):.0f} ms", *faster]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=["s", "b"], default=["s"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-training", action="store_true", help="time sampling only")
    args = parser.parse_args()
    torch.manual_seed(0)
    clock = "CPU" if args.threads == 1 else "wall"
    machine = describe_machine()
    print(f"`python benchmarks/dit.py {' '.join(sys.argv[1:])}`, {machine['date'][:10]}, torch {torch.__version__},")
    print(f"{machine['cpu']} ({machine['instruction_set']}), {args.threads} thread(s), {clock} time.\n")
    print("| model, 1,024 tokens | step | dense | 90% | 75% | 50% of heads |\n|---|---|---|---|---|---|")
    with threads(args.threads):
        for size in args.sizes:
            compared = models(size)
            wrong = {name: off for name, m in compared.items() if name != "dense" and (off := error(m)) > TOLERANCE}
            if wrong:
                print(f"WRONG, so not timed: {wrong}")
                return 1
            sampling = [partial(sample, model) for model in compared.values()]
            training = [partial(train, model) for model in compared.values()]
            print(f"| DiT-{size.upper()}/2 | sampling | {' | '.join(measure(sampling, args))} |", flush=True)
            if not args.no_training:
                print(f"| DiT-{size.upper()}/2 | training | {' | '.join(measure(training, args))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
