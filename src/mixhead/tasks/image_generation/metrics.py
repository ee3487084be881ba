"""How near generated images are to real ones: FID, sFID, Inception Score, precision and recall.

As the ADM evaluator defines them (Dhariwal & Nichol, arXiv 2105.05233, section 2.2), on the features of a network that
is named beside every figure: with another network than Inception-v3 the figures can only be compared with each other.

Features are folded into running sums as they come. What is kept besides is a random subset of a fixed size, for
precision and recall.

Shape legend: N images, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.tasks.image_generation.features import (
    EFFICIENTNET,
    ClassifierFeatures,
    EfficientNetFeatures,
    FeatureExtractor,
    Features,
)
from mixhead.tasks.image_generation.inception import InceptionFeatures

SPLIT = 5000  # images of one Inception Score, of which the mean is taken
SUBSET = 10_000  # images that precision and recall are measured on
NEIGHBOURS = 3  # a feature's sphere reaches to so many-th neighbour
BLOCK = 2048  # rows of a matrix of distances


class Moments:
    """Mean and covariance of features, from sums in float64 that are brought up to date batch by batch."""

    def __init__(self) -> None:
        self.count = 0
        self.mean_F = torch.zeros(())
        self.spread_FF = torch.zeros(())  # sum of the products of deviations from the mean

    def update(self, features_NF: Tensor) -> None:
        """Adds a batch; exact however large the mean is beside the deviations (Chan et al.)."""
        features_NF = features_NF.detach().cpu().double()
        new = len(features_NF)
        mean_F = features_NF.mean(0)
        deviations_NF = features_NF - mean_F
        shift_F = mean_F - self.mean_F
        total = self.count + new
        self.spread_FF = (
            self.spread_FF + deviations_NF.T @ deviations_NF + shift_F.outer(shift_F) * (self.count * new / total)
        )
        self.mean_F = self.mean_F + shift_F * (new / total)
        self.count = total

    @property
    def covariance_FF(self) -> Tensor:
        """Unbiased.

        Raises:
            MixheadError: where there are fewer than two images.
        """
        if self.count < 2:
            raise MixheadError(f"A covariance needs at least two images, and there are {self.count}.")
        return self.spread_FF / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared distance of two normal distributions (Heusel et al., arXiv 1706.08500, eq. 6): FID, or sFID."""
    root_FF = _square_root(a.covariance_FF)
    # The eigenvalues of the product of two covariances, which is not symmetric, are those of this symmetric matrix.
    overlap = torch.linalg.eigvalsh(root_FF @ b.covariance_FF @ root_FF).clamp(min=0).sqrt().sum()
    spread = a.covariance_FF.trace() + b.covariance_FF.trace()
    return float((a.mean_F - b.mean_F).square().sum() + spread - 2 * overlap)


def _square_root(covariance_FF: Tensor) -> Tensor:
    values_F, vectors_FF = torch.linalg.eigh(covariance_FF)
    return (vectors_FF * values_F.clamp(min=0).sqrt()) @ vectors_FF.T


class InceptionScore:
    """exp of the mean divergence of an image's class probabilities from their mean (Salimans et al., arXiv 1606.03498).

    Measured on consecutive splits of `split` images, whose mean is taken; a last one that is not full counts as well.
    """

    def __init__(self, split: int = SPLIT) -> None:
        self.split = split
        self._done: list[float] = []
        self._count, self._sum_K, self._entropy = 0, torch.zeros(()), 0.0

    def update(self, probs_NK: Tensor) -> None:
        """Adds the class probabilities of a batch."""
        probs_NK = probs_NK.detach().cpu().double()
        while len(probs_NK):
            part, probs_NK = probs_NK[: self.split - self._count], probs_NK[self.split - self._count :]
            self._count += len(part)
            self._sum_K = self._sum_K + part.sum(0)
            self._entropy += float(torch.xlogy(part, part).sum())
            if self._count == self.split:
                self._done.append(self._score())
                self._count, self._sum_K, self._entropy = 0, torch.zeros(()), 0.0

    def compute(self) -> float:
        """Mean of the splits."""
        scores = self._done + ([self._score()] if self._count else [])
        return sum(scores) / len(scores)

    def _score(self) -> float:
        mean_K = self._sum_K / self._count
        return float((self._entropy / self._count - torch.xlogy(mean_K, mean_K).sum()).exp())


class Subset:
    """A uniform random subset of features of a fixed size, whatever comes (reservoir sampling)."""

    def __init__(self, size: int = SUBSET, seed: int = 0) -> None:
        self.size, self._seen = size, 0
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: Tensor | None = None

    def update(self, features_NF: Tensor) -> None:
        """Offers a batch."""
        features_NF = features_NF.detach().cpu().float()
        if self._kept is None:
            self._kept = torch.zeros(self.size, features_NF.shape[1])
        for row_F in features_NF:
            place = self._seen
            if place >= self.size:
                place = int(torch.randint(self._seen + 1, (), generator=self._generator))
            if place < self.size:
                self._kept[place] = row_F
            self._seen += 1

    @property
    def features_NF(self) -> Tensor:
        """What was kept."""
        assert self._kept is not None
        return self._kept[: min(self._seen, self.size)]


def precision(generated_MF: Tensor, real_NF: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Share of the generated images near real ones; recall is that of the real images near generated ones.

    Near means inside the sphere around one of the others that reaches to its `neighbours`-th neighbour (Kynkäänniemi et
    al., arXiv 1904.06991, eqs. 1 and 2).
    """
    if min(len(real_NF), len(generated_MF)) <= neighbours:
        raise MixheadError(
            f"Precision and recall need more than {neighbours} images of either kind, and there are "
            f"{len(generated_MF)} and {len(real_NF)}."
        )
    radii_N = _radii(real_NF, neighbours)
    inside = [(torch.cdist(rows, real_NF) <= radii_N).any(1) for rows in generated_MF.split(BLOCK)]
    return float(torch.cat(inside).double().mean())


def _radii(features_NF: Tensor, neighbours: int) -> Tensor:
    blocks = (torch.cdist(rows, features_NF) for rows in features_NF.split(BLOCK))
    # The nearest of all is the image itself.
    return torch.cat([block.kthvalue(neighbours + 1, dim=1).values for block in blocks])


@dataclass
class ImageStatistics:
    """All that is remembered of a set of images.

    Attributes:
        pooled: moments of the features of whole images.
        spatial: moments of the features of places in them; None where the extractor has none.
        score: Inception Score; None where the extractor is no classifier.
        subset: for precision and recall.
    """

    pooled: Moments = field(default_factory=Moments)
    spatial: Moments | None = None
    score: InceptionScore | None = None
    subset: Subset = field(default_factory=Subset)

    @property
    def count(self) -> int:
        """Images seen."""
        return self.pooled.count

    def update(self, features: Features) -> None:
        """Adds the features of a batch."""
        self.pooled.update(features.pooled_NF)
        self.subset.update(features.pooled_NF)
        if features.spatial_NF is not None:
            self.spatial = self.spatial or Moments()
            self.spatial.update(features.spatial_NF)
        if features.probs_NK is not None:
            self.score = self.score or InceptionScore()
            self.score.update(features.probs_NK)


class Metric(NamedTuple):
    """Something measured of generated images beside real ones.

    Attributes:
        title: for tables.
        measure: of the statistics of the generated and of the real ones; None where the extractor does not have it.
    """

    title: str
    measure: Callable[[ImageStatistics, ImageStatistics], float | None]


def fid(generated: ImageStatistics, real: ImageStatistics) -> float:
    """Distance of the features of whole images; smaller is better."""
    return frechet_distance(real.pooled, generated.pooled)


def sfid(generated: ImageStatistics, real: ImageStatistics) -> float | None:
    """Distance of the features of places in the images; smaller is better."""
    if generated.spatial is None or real.spatial is None:
        return None
    return frechet_distance(real.spatial, generated.spatial)


# A new one is a function and a line here.
METRICS = {
    "fid": Metric("FID", fid),
    "sfid": Metric("sFID", sfid),
    "inception_score": Metric(
        "Inception Score, of the classes of these features",
        lambda generated, real: None if generated.score is None else generated.score.compute(),
    ),
    "precision": Metric(
        "precision", lambda generated, real: precision(generated.subset.features_NF, real.subset.features_NF)
    ),
    "recall": Metric(
        "recall", lambda generated, real: precision(real.subset.features_NF, generated.subset.features_NF)
    ),
}


def compare(extractor: str, generated: ImageStatistics, real: ImageStatistics) -> dict[str, Any]:
    """All metrics by name, between the name of the network whose features were compared and the numbers of images."""
    measured = {name: metric.measure(generated, real) for name, metric in METRICS.items()}
    return {"extractor": extractor, **measured, "generated": generated.count, "real": real.count}


def statistics(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> ImageStatistics:
    """Statistics of images that come in batches, uint8 [B, C, Y, X]; nothing of them is kept."""
    found = ImageStatistics()
    for features in _features(extractor, batches):
        found.update(features)
    return found


@torch.inference_mode()
def _features(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> Iterator[Features]:
    for images in batches:
        yield extractor(images)


def feature_extractor(name: str) -> FeatureExtractor:
    """The extractor behind a name on the command line.

    Args:
        name: "efficientnet-lite0", a file of Inception-v3 weights, or the folder of a small classifier.
    """
    path = Path(name)
    if name == EFFICIENTNET:
        return EfficientNetFeatures()
    if path.is_dir():
        return ClassifierFeatures(path)
    if path.is_file():
        return InceptionFeatures(path)
    raise MixheadError(
        f"The features {name} are unknown: give {EFFICIENTNET}, a file with the weights of Inception-v3, or the "
        "folder of a small classifier (`mixhead train fashion-mnist-features` makes one)."
    )
