"""MoH-ViT against the plain form of the same model: forward pass and training step, time and peak memory.

    python benchmarks/vision.py [--names moh-vit-b-75 transnext-base] [--size 224] [--batch 2] [--threads 1]

The plain form unfolds every window and computes every head, then multiplies by the gates, and makes the MLP's
convolution, activation and product one after the other, as the published code does; it shares all weights. Both must
agree before anything is timed. In each round both run, one after the other, and a matrix product between them: the
ratios are medians over the rounds, by CPU time with one thread and by the clock on the wall with more.

The floor is the time that the plain form's multiplications alone would take as large matrix products: their number
(PyTorch's FlopCounterMode; a training step counts three times) divided by the rate of a product of two matrices of
1,024 x 1,024 in the same round. It leaves out what no implementation can: reading the images, exponentials, norms.

Peak memory is what one run adds, at its most, to the process that holds weights and images; each is measured in a
process of its own.
"""

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from page import Page, add_option
from torch.utils.flop_counter import FlopCounterMode

from mixhead.bench.memory import give_back_freed, growth
from mixhead.bench.timing import race
from mixhead.models.moh_vit import PUBLISHED, MoHTransNeXtConfig, MoHTransNeXtForImageClassification
from mixhead.models.moh_vit import attention as attention_module
from mixhead.models.moh_vit.attention import PositionBias
from mixhead.models.moh_vit.modeling import ConvolutionalGLU
from mixhead.ops import RelativeBias, aggregated_attention

SIDE, PRODUCTS = 1024, 8  # of the matrices whose product tells the rate, and how many are made in a round
COLUMNS = ["model", "pass", "plain", "ours", "floor", "plain / ours", "ours / floor", "peak MiB, plain", "ours"]


class Plain:
    """Puts the plain forms of the attention, the MLP and the position biases in place."""

    def __enter__(self):
        self.kept = attention_module.aggregated_attention, ConvolutionalGLU.forward, PositionBias.forward
        attention_module.aggregated_attention = partial(aggregated_attention, impl="reference")
        ConvolutionalGLU.forward = plain_mlp
        PositionBias.forward = plain_bias

    def __exit__(self, *_):
        attention_module.aggregated_attention, ConvolutionalGLU.forward, PositionBias.forward = self.kept


def plain_mlp(self, hidden_BNC, size):
    gate_BNM, value_BNM = self.fc1(hidden_BNC).chunk(2, dim=-1)
    gate_BMYX = self.dwconv(gate_BNM.transpose(1, 2).unflatten(2, size).contiguous())
    return self.fc2(F.gelu(gate_BMYX.flatten(2).transpose(1, 2)) * value_BNM)


def plain_bias(self, positions):
    return RelativeBias(self.table(positions), positions.row_YU, positions.column_XV)


def in_plain(function: Callable[[], object]) -> object:
    with Plain():
        return function()


class Subject:
    """A model with random weights, random images, and the two passes."""

    def __init__(self, name: str, size: int, batch: int) -> None:
        torch.manual_seed(0)
        self.model = MoHTransNeXtForImageClassification(MoHTransNeXtConfig.named(name, drop_path_rate=0.0))
        self.images = torch.randn(batch, 3, size, size)
        self.labels = torch.randint(0, 1000, (batch,))

    def forward(self) -> torch.Tensor:
        self.model.eval()
        with torch.no_grad():
            return self.model(self.images).logits

    def train(self) -> None:
        self.model.train()
        self.model.zero_grad()
        self.model(self.images, labels=self.labels).loss.backward()

    def check(self) -> None:
        """Refuses to time a model that computes something else."""
        plain = in_plain(self.forward)
        torch.testing.assert_close(self.forward(), plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))

    def multiplications(self) -> float:
        """Floating point operations of a forward pass of the plain form."""
        with FlopCounterMode(display=False) as counter:
            in_plain(self.forward)
        return counter.get_total_flops()


def peaks(options: argparse.Namespace, name: str, which: str) -> list[float]:
    """MiB that a run adds, in the plain form and in ours."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        return [pool.apply(peak, (options, name, which, plain)) for plain in (True, False)]


def peak(options: argparse.Namespace, name: str, which: str, plain: bool) -> float:
    torch.set_num_threads(options.threads)
    run = getattr(Subject(name, 64, 1), which)  # the libraries' own pages are no part of the run
    in_plain(run) if plain else run()
    run = getattr(Subject(name, options.size, options.batch), which)
    give_back_freed()
    return growth(partial(in_plain, run) if plain else run)


def row(options: argparse.Namespace, name: str, which: str) -> list[str]:
    subject = Subject(name, options.size, options.batch)
    subject.check()
    flops = subject.multiplications() * (3 if which == "train" else 1)
    run, a, b = getattr(subject, which), torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    rounds = race([partial(in_plain, run), run, lambda: [a @ b for _ in range(PRODUCTS)]], options.rounds, 0.0)
    clock = "cpu" if options.threads == 1 else "wall"
    plain, ours, products = (getattr(times, clock) for times in rounds)
    floor = [time / (PRODUCTS * 2 * SIDE**3) * flops for time in products]
    return [
        f"{name}, {flops / 1e9:.0f} GFLOP",
        "training step" if which == "train" else "forward",
        *(f"{statistics.median(times):.2f} s" for times in (plain, ours, floor)),
        *(
            f"{statistics.median(x / y for x, y in zip(*pair, strict=True)):.2f}"
            for pair in ((plain, ours), (ours, floor))
        ),
        *(f"{mib:,.0f}" for mib in peaks(options, name, which)),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=["moh-vit-b-75"], choices=list(PUBLISHED))
    parser.add_argument("--passes", nargs="+", default=["forward", "train"], choices=["forward", "train"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = "CPU time" if options.threads == 1 else "wall time"
    what = f"{options.batch} images of {options.size} px, float32"
    about = f"{what}, {options.threads} thread(s), {clock}, {options.rounds} rounds."
    page = Page("MoH-ViT on the CPU against its plain form", COLUMNS, about, options.write)
    for name in options.names:
        for which in options.passes:
            page.add(*row(options, name, which))
    page.close()


if __name__ == "__main__":
    main()
