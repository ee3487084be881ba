"""Inception-v3 as FID is defined on it: TensorFlow's network of 2015 with 1,008 classes, from a local file of weights.

The file is the state dict that implementations of FID for PyTorch share (`pt_inception-2015-12-05`); it names its
parameters as here. This network differs from later Inception-v3s: averages leave out the padding, the last block takes
a maximum, images are scaled as TensorFlow 1 did. It was never tried with the real
weights: none were at hand; names and shapes are theirs, and with random weights features and classes are those of
torch-fidelity 0.4.0 to 6e-8.

Shape legend: N images, C channels, Y rows, X columns, F features, K classes.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mixhead.errors import MixheadError, first_line
from mixhead.tasks.image_generation.features import SPATIAL_CHANNELS, FeatureExtractor, Features, colour

SIDE = 299
CLASSES = 1008


class Conv(nn.Module):
    """Convolution, batch norm, ReLU; padded so that a stride of 1 keeps the size, a stride of 2 pads nothing."""

    def __init__(
        self, before: int, after: int, kernel: int | tuple[int, int] = 1, stride: int = 1, pad: bool = True
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if pad and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(before, after, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, map_NCYX: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(map_NCYX)))


def average(map_NCYX: Tensor) -> Tensor:
    """Mean of 3 x 3 places, without the padding."""
    return F.avg_pool2d(map_NCYX, 3, stride=1, padding=1, count_include_pad=False)


class Mixed5(nn.Module):
    """35 x 35 places: 1 x 1, 5 x 5 and twice 3 x 3."""

    def __init__(self, before: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(before, 64)
        self.branch5x5_1, self.branch5x5_2 = Conv(before, 48), Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3 = (
            Conv(before, 64),
            Conv(64, 96, 3),
            Conv(96, 96, 3),
        )
        self.branch_pool = Conv(before, pooled)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(average(x))], 1)


class Mixed6a(nn.Module):
    """35 x 35 places to 17 x 17."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(before, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(before, 64), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class Mixed6(nn.Module):
    """17 x 17 places: 1 x 1 and rows and columns of 7."""

    def __init__(self, width: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Conv(768, 192)
        self.branch7x7_1, self.branch7x7_2 = Conv(768, width), Conv(width, width, row)
        self.branch7x7_3 = Conv(width, 192, column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(768, width), Conv(width, width, column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(width, width, row), Conv(width, width, column)
        self.branch7x7dbl_5 = Conv(width, 192, row)
        self.branch_pool = Conv(768, 192)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average(x))], 1)


class Mixed7a(nn.Module):
    """17 x 17 places to 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192), Conv(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(768, 192), Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1)), Conv(192, 192, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class Mixed7(nn.Module):
    """8 x 8 places; the last of these blocks takes a maximum where the others take a mean."""

    def __init__(self, before: int, takes_maximum: bool) -> None:
        super().__init__()
        self.takes_maximum = takes_maximum
        row, column = (1, 3), (3, 1)
        self.branch1x1, self.branch3x3_1 = Conv(before, 320), Conv(before, 384)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, row), Conv(384, 384, column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(before, 448), Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, row), Conv(384, 384, column)
        self.branch_pool = Conv(before, 192)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.takes_maximum else average(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


class InceptionV3(nn.Module):
    """The network, under the names of the shared file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = Conv(32, 64, 3), Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = Mixed5(192, 32), Mixed5(256, 64), Mixed5(288, 64)
        self.Mixed_6a = Mixed6a(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(Mixed6, (128, 160, 160, 192))
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = Mixed7a(), Mixed7(1280, False), Mixed7(2048, True)
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, images_N3YX: Tensor) -> Features:
        """Features of images of 299 x 299 pixels in [-1, 1]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images_N3YX)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        # Before norm and ReLU, as the ADM evaluator reads them.
        spatial = self.Mixed_6d.branch1x1.conv(x)[:, :SPATIAL_CHANNELS]
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        pooled_NF = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))
        # Without the bias, as the ADM evaluator does.
        return Features(pooled_NF, spatial.flatten(1), (pooled_NF @ self.fc.weight.T).softmax(1))


class InceptionFeatures(FeatureExtractor):
    """Inception-v3 with weights from a local file.

    Args:
        weights: a file of PyTorch or safetensors; nothing in it is executed.
    """

    name = "Inception-v3 (2015)"

    def __init__(self, weights: Path) -> None:
        super().__init__()
        try:
            if weights.suffix == ".safetensors":
                state = load_file(weights)
            else:
                state = torch.load(weights, map_location="cpu", weights_only=True)
            self.network = InceptionV3()
            missing, unexpected = self.network.load_state_dict(state, strict=False)
        except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise MixheadError(
                f"{weights} holds no weights of Inception-v3 that can be read ({first_line(error)})."
            ) from error
        lost = [name for name in missing if not name.endswith("num_batches_tracked")]
        if lost or unexpected:
            raise MixheadError(
                f"{weights} holds weights of another network than the Inception-v3 of FID: it misses {lost[:3]} and "
                f"has {unexpected[:3]}."
            )
        self.network.eval().requires_grad_(False)

    def forward(self, images_NCYX: Tensor) -> Features:
        return self.network(scaled(colour(images_NCYX).float()).sub(128).div(128))


def scaled(images_NCYX: Tensor) -> Tensor:
    """Images at 299 x 299 pixels, bilinear between pixels whose first ones coincide, as TensorFlow 1 did it."""
    rows, columns = (interpolation(side, SIDE).to(images_NCYX) for side in images_NCYX.shape[-2:])
    return rows @ images_NCYX @ columns.T


def interpolation(before: int, after: int) -> Tensor:
    """Matrix [after, before] of the weights of pixels in a line."""
    place = torch.arange(after, dtype=torch.float64) * (before / after)
    low = place.floor().long()
    high = (low + 1).clamp(max=before - 1)
    share = (place - low).unsqueeze(1)
    return F.one_hot(low, before) * (1 - share) + F.one_hot(high, before) * share
