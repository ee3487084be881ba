"""Statistics of routings, over plain arrays.

Neighbouring tokens are alike, so they are no independent observations: errors are computed over blocks of up to 64
tokens of one sequence (`blocks_of`), of which each counts as one observation. Bands that treated every token as
independent would be several times too narrow.

Shape legend: T tokens, H heads, I heads of another layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixhead.recording.file import Tokens

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Ints = NDArray[np.integer[Any]]

BLOCK = 64
BAND = 1.96  # standard errors on either side: a band of 95%
NEVER, ALWAYS = 0.001, 0.999  # loads beyond which a head counts as dead or saturated
ALIKE = 0.01  # of relative entropy, between layers that are called equally even


@dataclass(frozen=True)
class Load:
    """How many of the tokens use each head.

    Attributes:
        share_H: share of the tokens, 0 to 1.
        error_H: its standard error over blocks of tokens; NaN where there is only one block.
        tokens: how many tokens were counted.
    """

    share_H: Floats
    error_H: Floats
    tokens: int

    @property
    def band_H2(self) -> Floats:
        """The band that holds the true load with 95% confidence, cut to 0 and 1."""
        spread_H = BAND * self.error_H
        return np.stack([self.share_H - spread_H, self.share_H + spread_H], -1).clip(0, 1)


def blocks_of(tokens: Tokens, size: int = BLOCK) -> Ints:
    """The block that each token belongs to, int [T]: runs of `size` tokens of one sequence, never of two."""
    keys_T2 = np.stack([tokens.sequence, tokens.position // size], -1)
    return np.unique(keys_T2, axis=0, return_inverse=True)[1].reshape(-1)


def load_of(selected_TH: Bools, block_T: Ints) -> Load:
    """Load of each head, with errors over the blocks (the ratio estimator of cluster sampling)."""
    tokens, heads = selected_TH.shape
    if tokens == 0:
        return Load(np.zeros(heads), np.full(heads, np.nan), 0)
    block_T = np.unique(block_T, return_inverse=True)[1].reshape(-1)
    blocks = int(block_T.max()) + 1
    used_XH = np.zeros((blocks, heads))
    np.add.at(used_XH, block_T, selected_TH)
    size_X1 = np.bincount(block_T, minlength=blocks)[:, None]
    share_H = used_XH.sum(0) / tokens
    if blocks < 2:
        return Load(share_H, np.full(heads, np.nan), tokens)
    residual_XH = used_XH - share_H * size_X1
    error_H = np.sqrt(blocks / (blocks - 1) * (residual_XH**2).sum(0)) / tokens
    return Load(share_H, error_H, tokens)


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
        p_H: two-sided p-value of each head (a z-test with errors over blocks); NaN where there is no error.
        adjusted_H: p-values corrected for the number of heads tested, after Benjamini and Hochberg.
    """

    share_H: Floats
    p_H: Floats
    adjusted_H: Floats


def difference(first: Load, second: Load) -> Difference:
    """Tests whether two groups of tokens use heads differently."""
    share_H = first.share_H - second.share_H
    error_H = np.sqrt(first.error_H**2 + second.error_H**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        z_H = np.where(share_H == 0, 0.0, np.abs(share_H) / error_H)
    p_H = np.array([math.erfc(z / math.sqrt(2)) for z in z_H])
    p_H[np.isnan(error_H)] = np.nan
    return Difference(share_H, p_H, false_discovery(p_H))


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
        sentences.append(f"Dead: {listed(dead)} {were(dead)} used by hardly any token (under 0.1%).")
    if saturated:
        sentences.append(
            f"Saturated: {listed(saturated)} {were(saturated)} used by practically every token (over 99.9%), though "
            f"{'they compete' if len(saturated) > 1 else 'it competes'} with the others."
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


def were(names: Sequence[str]) -> str:
    """Was or were."""
    return "were" if len(names) > 1 else "was"
