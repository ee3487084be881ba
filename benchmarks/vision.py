"""MoH-ViT against the plain form of the same model: aggregated attention alone, the whole model, a training step.

    python benchmarks/vision.py [--names moh-vit-b-75 transnext-base] [--size 224] [--batch 2] [--pairs 7] [--train]

The plain form unfolds every window and computes every head, then multiplies by the gates, as the published code does;
it shares all weights. Each pair runs both, one after the other; the median of the ratios is printed, in CPU time of
this process. Before anything is timed, both must agree. The floor is what the multiplications of the plain form's
layers alone would take at the rate of a large matrix product, measured between the pairs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mixhead.models.moh_vit import PUBLISHED, MoHTransNeXtConfig, MoHTransNeXtForImageClassification
from mixhead.models.moh_vit import attention as attention_module
from mixhead.models.moh_vit.attention import PositionBias
from mixhead.models.moh_vit.modeling import ConvolutionalGLU
from mixhead.ops import RelativeBias, aggregated_attention


class Plain:
    """Puts the plain forms of the attention, the MLP and the position biases in place."""

    def __enter__(self):
        self.kept = (
            attention_module.aggregated_attention,
            ConvolutionalGLU.forward,
            PositionBias.forward,
        )
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


def cpu_time(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def forward(model, images):
    with torch.no_grad():
        return model(images).logits


def train_step(model, images, labels):
    model.zero_grad()
    model(images, labels=labels).loss.backward()


def in_plain(function: Callable[[], object]) -> object:
    with Plain():
        return function()


def check(model, images):
    """Refuses to time a model that computes something else."""
    with torch.no_grad():
        ours, plain = model(images).logits, in_plain(lambda: model(images).logits)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


def multiplications(model, images) -> float:
    with FlopCounterMode(display=False) as counter:
        in_plain(lambda: forward(model, images))
    return counter.get_total_flops()


def matrix_time(flops: float) -> float:
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return cpu_time(lambda: [a @ b for _ in range(4)]) / (4 * 2 * 1024**3) * flops


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=["moh-vit-b-75"], choices=list(PUBLISHED))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train", action="store_true", help="a training step instead of a forward pass")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"| model | {'training step' if options.train else 'forward'} | plain | floor | plain / ours | ours / floor |"
    )
    print("|---|---|---|---|---|---|")
    for name in options.names:
        torch.manual_seed(0)
        model = MoHTransNeXtForImageClassification(MoHTransNeXtConfig.named(name, drop_path_rate=0.0)).eval()
        images = torch.randn(options.batch, 3, options.size, options.size)
        labels = torch.randint(0, 1000, (options.batch,))
        check(model, images)
        flops = multiplications(model, images) * (3 if options.train else 1)
        model.train(options.train)
        run = (lambda: train_step(model, images, labels)) if options.train else (lambda: forward(model, images))  # noqa: B023
        rows = []
        for _ in range(options.pairs + 1):
            rows.append((cpu_time(run), cpu_time(lambda: in_plain(run)), matrix_time(flops)))  # noqa: B023
        ours, plain, floor = (statistics.median(column) for column in zip(*rows[1:], strict=True))
        ratio = statistics.median(p / o for o, p, _ in rows[1:])
        above = statistics.median(o / f for o, _, f in rows[1:])
        print(f"| {name} | {ours:.2f} s | {plain:.2f} s | {floor:.2f} s | {ratio:.2f} | {above:.2f} |", flush=True)


if __name__ == "__main__":
    main()
