"""Statistics of routings, over plain arrays.

Neighbouring tokens are alike, so they are no independent observations: errors are computed over blocks of up to 64
tokens of one sequence (`blocks_of`), of which each counts as one observation. Bands that treated every token as
independent would be several times too narrow. What is promised here holds in simulations down to `LEAST_BLOCKS`.

Shape legend: T tokens, H heads, I heads of another layer, X blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixhead.intervals import inflation, share_band, t_tails
from mixhead.recording.file import Tokens

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Ints = NDArray[np.integer[Any]]

BLOCK = 64
LEAST_BLOCKS = 10  # in each of two groups; with fewer no test could hold what it promises and still find anything
NEVER, ALWAYS = 0.001, 0.999  # loads beyond which a head counts as dead or saturated
ALIKE = 0.01  # of relative entropy, between layers that are called equally even


@dataclass(frozen=True)
class Load:
    """How many of the tokens use each head.

    Attributes:
        share_H: share of the tokens, 0 to 1.
        error_H: its standard error over blocks of tokens; NaN where there is only one block.
        tokens: how many tokens were counted.
        blocks: how many blocks they are in.
        pairs: for how many tokens there is another in the same block, summed over these others: n (n - 1) of a block
            of n. Tokens of one block are alike; this says how much that matters.
    """

    share_H: Floats
    error_H: Floats
    tokens: int
    blocks: int = 1
    pairs: int = 0

    @property
    def band_H2(self) -> Floats:
        """The band that holds the true load with 95% confidence, between 0 and 1; NaN where there is only one block.

        Wilson's interval for as many independent tokens as would have the same error. Where all tokens or none use a
        head it is as many as for the other heads, or one a block where there are none.
        """
        if self.blocks < 2:
            return np.full((len(self.share_H), 2), np.nan)
        variance_H = self.share_H * (1 - self.share_H)
        with np.errstate(divide="ignore", invalid="ignore"):
            worth_H = np.minimum(variance_H / self.error_H**2, self.tokens)
        known_H = variance_H > 0
        worth_H[~known_H] = max(np.median(worth_H[known_H]), self.blocks) if known_H.any() else self.blocks
        return share_band(self.share_H, worth_H, self.blocks - 1)


def blocks_of(tokens: Tokens, size: int = BLOCK) -> Ints:
    """The block that each token belongs to, int [T]: runs of `size` tokens of one sequence, never of two."""
    keys_T2 = np.stack([tokens.sequence, tokens.position // size], -1)
    return np.unique(keys_T2, axis=0, return_inverse=True)[1].reshape(-1)


def load_of(selected_TH: Bools, block_T: Ints) -> Load:
    """Load of each head, with errors over the blocks (the ratio estimator of cluster sampling)."""
    tokens, heads = selected_TH.shape
    if tokens == 0:
        return Load(np.zeros(heads), np.full(heads, np.nan), 0, 0)
    block_T = np.unique(block_T, return_inverse=True)[1].reshape(-1)
    blocks = int(block_T.max()) + 1
    used_XH = np.zeros((blocks, heads))
    np.add.at(used_XH, block_T, selected_TH)
    size_X1 = np.bincount(block_T, minlength=blocks)[:, None]
    pairs = int((size_X1 * (size_X1 - 1)).sum())
    share_H = used_XH.sum(0) / tokens
    if blocks < 2:
        return Load(share_H, np.full(heads, np.nan), tokens, blocks, pairs)
    residual_XH = used_XH - share_H * size_X1
    deviation_H = blocks / (blocks - 1) * (residual_XH**2).sum(0)
    error_H = np.sqrt(deviation_H * inflation(residual_XH)) / tokens
    return Load(share_H, error_H, tokens, blocks, pairs)


def load_by(selected_TH: Bools, label_T: NDArray[Any], block_T: Ints) -> dict[Any, Load]:
    """Load of each head among the tokens of each label, in the order of the labels; -1 and NaN are no labels."""
    known_T = ~np.isnan(label_T) if label_T.dtype.kind == "f" else label_T != -1 if label_T.dtype.kind in "iu" else None
    values = np.unique(label_T if known_T is None else label_T[known_T])
    return {value.item(): load_of(selected_TH[label_T == value], block_T[label_T == value]) for value in values}


@dataclass(frozen=True)
class Difference:
    """How the loads of two groups of tokens differ.

    Attributes:
        share_H: load in the first group minus load in the second.
        p_H: two-sided p-value of each head; NaN where there was no test.
        adjusted_H: p-values corrected for the number of heads tested, after Benjamini and Hochberg.
        refused: why there was no test, a sentence; "" where there was one.
    """

    share_H: Floats
    p_H: Floats
    adjusted_H: Floats
    refused: str = ""


def difference(first: Load, second: Load) -> Difference:
    """Tests whether two groups of tokens use heads differently, by a t-test that holds from ten blocks on.

    The variance of a load is the larger of what its own blocks say and what is to be expected if both groups are alike
    (`expected_variance`): a few blocks of a rarely used head may be equal by chance, and would then seem to be certain.
    The degrees of freedom are Satterthwaite's.
    """
    share_H = first.share_H - second.share_H
    if refused := too_few(first.blocks, second.blocks):
        nothing_H = np.full(share_H.shape, np.nan)
        return Difference(share_H, nothing_H, nothing_H, refused)
    alike_H = correlation(first, second)
    variances = [
        np.maximum(load.error_H**2, expected_variance(load, pooled_share(first, second), alike_H))
        for load in (first, second)
    ]
    total_H = variances[0] + variances[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        t_H = np.where(share_H == 0, 0.0, np.abs(share_H) / np.sqrt(total_H))
        freedom_H = total_H**2 / (variances[0] ** 2 / (first.blocks - 1) + variances[1] ** 2 / (second.blocks - 1))
    p_H = t_tails(t_H, np.nan_to_num(freedom_H, nan=1.0))
    return Difference(share_H, p_H, false_discovery(p_H))


def too_few(first: int, second: int) -> str:
    """The sentence that refuses a test of groups of so many blocks; "" where there are enough."""
    if min(first, second) >= LEAST_BLOCKS:
        return ""
    return (
        f"No test: there are {first} and {second} blocks of tokens, and it takes {LEAST_BLOCKS} of each to tell a "
        "difference from chance."
    )


def pooled_share(first: Load, second: Load) -> Floats:
    """Load among the tokens of both groups."""
    return (first.tokens * first.share_H + second.tokens * second.share_H) / (first.tokens + second.tokens)


def correlation(*groups: Load) -> Floats:
    """How alike two tokens of one block are in their use of each head, 0 to 1, in all of the groups together.

    1 where all tokens of a group do the same: blocks that never differ say nothing about how alike their tokens are.
    NaN where a group has only one block.
    """
    tokens, pairs = max(1, sum(load.tokens for load in groups)), sum(load.pairs for load in groups)
    variance_H = sum(load.tokens * load.share_H * (1 - load.share_H) for load in groups) / tokens
    deviation_H = sum((load.tokens * load.error_H) ** 2 for load in groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        alike_H = (deviation_H / variance_H - tokens) / max(pairs, 1)
    return np.where(variance_H > 0, np.clip(alike_H, 0, 1), 1.0)


def expected_variance(load: Load, share_H: Floats, alike_H: Floats) -> Floats:
    """Variance of the load of a group of tokens that use heads with these probabilities and correlations."""
    return share_H * (1 - share_H) * (load.tokens + alike_H * load.pairs) / load.tokens**2


def false_discovery(p_X: Floats) -> Floats:
    """p-values adjusted after Benjamini and Hochberg: below 0.05, at most 5% of what is reported is chance."""
    adjusted_X = np.full(p_X.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p_X))
    falling = known[np.argsort(-p_X[known], kind="stable")]
    rank = np.arange(len(falling), 0, -1)
    adjusted_X[falling] = np.minimum.accumulate(np.minimum(p_X[falling] * len(falling) / rank, 1.0))
    return adjusted_X


def coefficient_of_variation(share_H: Floats) -> float:
    """Standard deviation of the loads over their mean: 0 where all heads are used alike."""
    mean = float(share_H.mean()) if len(share_H) else 0.0
    return float(share_H.std()) / mean if mean > 0 else 0.0


def relative_entropy(share_H: Floats) -> float:
    """Entropy of the loads over that of even ones: 1 where all heads are used alike, 0 where one head does all."""
    total = float(share_H.sum())
    if len(share_H) < 2 or total <= 0:
        return 1.0
    part_H = share_H[share_H > 0] / total
    return float(-(part_H * np.log(part_H)).sum() / math.log(len(share_H)))


def co_activation(selected_TH: Bools) -> Floats:
    """Correlation of each two heads' use over the tokens, [H, H]; 0 for heads that are used always or never."""
    centred_TH = selected_TH - selected_TH.mean(0) if len(selected_TH) else selected_TH.astype(float)
    spread_H = np.sqrt((centred_TH**2).sum(0))
    scale_HH = np.outer(spread_H, spread_H)
    product_HH = centred_TH.T @ centred_TH
    return np.divide(product_HH, scale_HH, out=np.zeros_like(product_HH), where=scale_HH > 1e-12)


def agreement(selected_TH: Bools, selected_TI: Bools) -> float:
    """How alike two layers sort the same tokens, 0 to 1, whatever the numbers of their heads (linear CKA).

    1 where tokens that use the same heads in one layer use the same heads in the other; 0 where knowing the heads of
    one layer says nothing of the other, or where a layer treats all tokens alike.
    """
    if not len(selected_TH):
        return 0.0
    first_TH, second_TI = selected_TH - selected_TH.mean(0), selected_TI - selected_TI.mean(0)
    scale = np.linalg.norm(first_TH.T @ first_TH) * np.linalg.norm(second_TI.T @ second_TI)
    return float((np.linalg.norm(first_TH.T @ second_TI) ** 2) / scale) if scale > 1e-12 else 0.0


def position_bins(position_T: Ints) -> tuple[Ints, dict[int, str]]:
    """Positions in bins that double (0, 1, 2-3, 4-7, …): the bin of each token, and the name of each bin."""
    bin_T = np.where(position_T > 0, np.floor(np.log2(np.maximum(position_T, 1))) + 1, 0).astype(np.int32)
    names = {0: "0", 1: "1"}
    names |= {b: f"{2 ** (b - 1)}–{2**b - 1}" for b in range(2, int(bin_T.max(initial=0)) + 1)}
    return bin_T, names


def in_words(loads: Mapping[str, Load], shared: Mapping[str, Sequence[int]]) -> list[str]:
    """What stands out, as sentences: dead and saturated heads, the least and the most even layer."""
    dead, saturated, whole = [], [], []
    evenness: dict[str, float] = {}
    for layer, load in loads.items():
        fixed = np.isin(np.arange(len(load.share_H)), shared.get(layer, []))
        if load.tokens and (load.share_H > ALWAYS).all():
            whole.append(layer)
            continue
        dead += [f"head {h} of {layer}" for h in np.flatnonzero((load.share_H < NEVER) & ~fixed)]
        saturated += [f"head {h} of {layer}" for h in np.flatnonzero((load.share_H > ALWAYS) & ~fixed)]
        if (~fixed).sum() > 1:
            evenness[layer] = relative_entropy(load.share_H[~fixed])
    sentences = []
    if dead:
        sentences.append(f"Dead: {listed(dead)} {was_or_were(dead)} used by hardly any token (under 0.1%).")
    if saturated:
        sentences.append(
            f"Saturated: {listed(saturated)} {was_or_were(saturated)} used by practically every token (over 99.9%), "
            f"though {'they compete' if len(saturated) > 1 else 'it competes'} with the others."
        )
    tokens = max((load.tokens for load in loads.values()), default=0)
    if (dead or saturated) and tokens < 1 / NEVER:
        sentences.append(f"These are {tokens:,} tokens, few for such findings: others may use these heads differently.")
    if not dead and not saturated and evenness:
        sentences.append("No head that competes is dead, and none is saturated.")
    if whole:
        sentences.append(f"Every token uses all heads of {listed(whole)}: no head competes there.")
    if len(evenness) < 2:
        return sentences
    worst, best = min(evenness, key=evenness.__getitem__), max(evenness, key=evenness.__getitem__)
    if evenness[best] - evenness[worst] < ALIKE:
        sentences.append(
            f"In every layer the competing heads are used alike (entropy at least {evenness[worst]:.2f} of 1)."
        )
    else:
        sentences.append(
            f"Heads are used least evenly in {worst} (entropy {evenness[worst]:.2f} of 1) and most evenly in {best} "
            f"({evenness[best]:.2f})."
        )
    return sentences


def listed(names: Sequence[str], most: int = 6) -> str:
    """`a, b and c`; of a long list the beginning."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def was_or_were(names: Sequence[str]) -> str:
    """Was or were."""
    return "were" if len(names) > 1 else "was"
