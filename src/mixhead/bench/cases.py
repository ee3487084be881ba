"""The shapes that are measured: presets, and the figures that the kernel has to reach.

Shape legend: H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mixhead.errors import MixheadError

FORWARD, BACKWARD, DECODE = "forward", "forward + backward", "decode"


@dataclass(frozen=True)
class Case:
    """One shape of attention and what is computed of it.

    Attributes:
        batch: rows of the batch.
        tokens: queries of each.
        causal: whether a query sees the keys up to its own position only.
        backward: whether the gradients are computed too.
        keys: keys, where there are not as many as queries (a cache).
        heads: H.
        kv_heads: key-value heads, a divisor of H.
        head_dim: D.
    """

    batch: int = 1
    tokens: int = 1024
    causal: bool = False
    backward: bool = False
    keys: int | None = None
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 64

    def __post_init__(self) -> None:
        sizes = (self.batch, self.tokens, self.num_keys, self.heads, self.kv_heads, self.head_dim)
        if min(sizes) < 1 or self.heads % self.kv_heads:
            raise MixheadError(f"{self} cannot be measured: sizes are at least 1, and kv_heads divides heads.")

    @property
    def num_keys(self) -> int:
        """How many keys there are."""
        return self.tokens if self.keys is None else self.keys

    @property
    def direction(self) -> str:
        """What is computed, in words."""
        if self.keys is not None and self.tokens == 1:
            return DECODE
        return BACKWARD if self.backward else FORWARD

    @property
    def title(self) -> str:
        """The shape, in words."""
        size = f"{self.batch} x {self.tokens}" + (f" of {self.keys}" if self.keys else "")
        mask = "" if self.direction == DECODE else ", causal" if self.causal else ", bidirectional"
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        usual = (self.heads, self.kv_heads, self.head_dim) == (16, 16, 64)
        return size + mask + ("" if usual else f", {heads} heads of {self.head_dim}")


def few_tokens(case: Case) -> Case:
    """The same case, batch 1 and at most 128 tokens: enough to go through all of an engine's code."""
    keys = None if case.keys is None else min(case.keys, 128)
    return replace(case, batch=1, tokens=min(case.tokens, 128), keys=keys)


@dataclass(frozen=True)
class Figure:
    """A case with what it has to reach.

    Attributes:
        case: the shape.
        dtype: "float32" or "bfloat16".
        required: the ratio to dense attention that is wanted, by the share of heads that are active.
        routing: how the heads are chosen.
        gated: whether the ratio is to dense attention followed by the gates, instead of dense attention alone.
    """

    case: Case
    dtype: str
    required: dict[float, float]
    routing: str = "random"
    gated: bool = False


DECODE_LARGE = Case(1, 1, True, keys=4096, heads=32, kv_heads=32, head_dim=128)

PRESETS = {
    "quick": (
        Case(8, 197),
        Case(1, 1024),
        Case(1, 1024, True),
        Case(8, 197, backward=True),
        Case(1, 1024, backward=True),
        Case(1, 1024, True, backward=True),
    ),
    "long": (
        Case(1, 4096),
        Case(1, 4096, True),
        Case(1, 4096, True, heads=32, kv_heads=8),
        Case(1, 4096, backward=True),
        Case(1, 4096, True, backward=True),
    ),
    "small": tuple(
        Case(batch, tokens, causal)
        for batch, tokens in ((1, 1), (1, 16), (1, 32), (1, 64), (1, 128), (8, 32), (64, 1), (64, 16), (64, 64))
        for causal in (False, True)
    ),
    "decode": (
        DECODE_LARGE,
        replace(DECODE_LARGE, kv_heads=8),
        replace(DECODE_LARGE, batch=4, keys=1024, kv_heads=8),
        Case(8, 1, True, keys=1024),
    ),
}
FIGURES = "figures"

BOTH = (False, True)
ALL_HEADS, AUTO = 0.97, 0.98  # of dense, what is allowed with nothing to skip, and where `auto` decides
SKEW = 0.9  # of the balanced figure, what skewed routing has to reach


Shares = tuple[float, float, float]  # ratios at 75, 50 and 25% of the heads


@dataclass(frozen=True)
class Wanted:
    """What an instruction set has to reach; pairs are bidirectional and causal.

    Attributes:
        images: forward in float32, 8 x 197 tokens.
        by_tokens: forward in float32, by the number of tokens.
        backward: forward + backward in float32.
        bf16: forward in bfloat16, by the number of tokens.
    """

    images: Shares
    by_tokens: dict[int, tuple[Shares, Shares]]
    backward: Shares
    bf16: dict[int, tuple[Shares, Shares]]


BY_TOKENS = {1024: ((1.45, 2.1, 4.0), (1.75, 2.5, 4.5)), 4096: ((1.6, 2.3, 4.5), (1.8, 2.6, 5.0))}
IN_FLOAT32, DOT_PRODUCTS = (1.8, 2.5, 4.5), (2.5, 3.5, 6.0)
AVX512 = Wanted((1.25, 1.7, 2.6), BY_TOKENS, (1.4, 2.0, 3.8), dict.fromkeys((1024, 4096), (IN_FLOAT32, IN_FLOAT32)))
BF16 = replace(AVX512, bf16=dict.fromkeys((1024, 4096), (DOT_PRODUCTS, DOT_PRODUCTS)))
AVX2 = Wanted(
    images=(1.3, 1.75, 2.7),
    by_tokens={1024: ((1.45, 2.1, 4.0), (1.8, 2.55, 4.5)), 4096: ((1.5, 2.2, 4.3), (1.75, 2.5, 4.8))},
    backward=(1.4, 2.0, 3.7),
    bf16={1024: ((1.5, 2.2, 4.0), (1.9, 2.7, 4.6))},
)
WANTED = {"amx": BF16, "avx512_bf16": BF16, "avx512": AVX512, "avx2": AVX2, "plain": AVX2}


def figures() -> Iterator[Figure]:
    """Every case with a figure to reach on this machine's instruction set."""
    from mixhead.ops import cpu  # a case is described without PyTorch

    wanted = WANTED[cpu.best_level()]
    yield needed(Case(8, 197), "float32", *wanted.images)
    for tokens, by_mask in wanted.by_tokens.items():
        for causal in BOTH:
            yield needed(Case(1, tokens, causal), "float32", *by_mask[causal])
            if tokens == 1024:
                balanced = dict(zip((0.75, 0.5, 0.25), by_mask[causal], strict=True))
                skewed = {share: SKEW * figure for share, figure in balanced.items()}
                yield Figure(Case(1, tokens, causal), "float32", skewed, routing="skewed")
    for tokens in (1024, 4096):
        for causal in BOTH:
            yield needed(Case(1, tokens, causal, backward=True), "float32", *wanted.backward)
    for tokens, by_mask in wanted.bf16.items():
        for causal in BOTH:
            yield needed(Case(1, tokens, causal), "bfloat16", *by_mask[causal])
    yield needed(DECODE_LARGE, "float32", 1.3, 1.95, 3.8)
    for case in PRESETS["small"]:
        for dtype in ("float32", "bfloat16"):
            yield Figure(case, dtype, {0.75: AUTO, 0.5: AUTO}, gated=True)


def needed(case: Case, dtype: str, at_75: float, at_50: float, at_25: float) -> Figure:
    """A figure for each of the usual shares, and for all heads."""
    return Figure(case, dtype, {1.0: ALL_HEADS, 0.75: at_75, 0.5: at_50, 0.25: at_25})
