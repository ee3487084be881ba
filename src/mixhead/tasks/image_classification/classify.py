"""Single images classified: the likeliest labels, and which heads every patch used.

Shape legend: N tokens, H heads, Y and X rows and columns of a map of patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from mixhead.data.image_files import read_image
from mixhead.errors import MixheadError
from mixhead.models.patches import patch_grid
from mixhead.recording import keep_routing
from mixhead.routing import Routing
from mixhead.tasks.image_classification.evaluate import heads_of, logits_of


@dataclass(frozen=True, eq=False)
class HeadMap:
    """Which heads the patches of one image used in one layer.

    Attributes:
        layer: its name.
        selected_YXH: bool.
        gates_YXH: the weight of each head, 0 where it is not selected.
    """

    layer: str
    selected_YXH: Tensor
    gates_YXH: Tensor

    @property
    def competes_H(self) -> Tensor:
        """bool [H], True at heads that some patches used and others did not."""
        return self.selected_YXH.any(0).any(0) & ~self.selected_YXH.all(0).all(0)

    @property
    def carrying_YX(self) -> Tensor:
        """How many heads carry the weight of a patch: (sum of gates)^2 / sum of squared gates.

        The number of selected heads where all of them weigh the same, less where a few of them decide.
        """
        return self.gates_YXH.sum(-1).square() / self.gates_YXH.square().sum(-1).clamp(min=1e-12)


@dataclass(frozen=True, eq=False)
class Classification:
    """What a model says of one image.

    Attributes:
        file: the image.
        labels: names of the likeliest classes, the likeliest first.
        probabilities: theirs.
        used: heads that a patch used, the mean over patches, added over the layers; layers that do not route use all.
        heads: heads of all layers.
        maps: one for each layer that routes.
        pixels_CYX: the image as the model saw it.
    """

    file: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    used: float
    heads: int
    maps: tuple[HeadMap, ...]
    pixels_CYX: Tensor

    def map_of(self, layer: str | None = None) -> HeadMap:
        """The map of a layer; by default the last one in which heads compete.

        Raises:
            MixheadError: where there is none.
        """
        if layer is None:
            found = [m for m in self.maps if m.competes_H.any()] or list(self.maps)
        else:
            found = [m for m in self.maps if m.layer == layer]
        if not found:
            known = ", ".join(m.layer for m in self.maps) or "none: it is a dense model"
            raise MixheadError(
                f"No map of {layer or 'heads'} can be drawn; the layers of the model that route: {known}."
            )
        return found[-1]


@torch.no_grad()
def classify(
    model: PreTrainedModel, processor: ImageProcessingMixin, file: Path, classes: tuple[str, ...], top: int = 5
) -> Classification:
    """Classifies one image file.

    Args:
        model: an image classifier in evaluation mode.
        processor: prepares images for it.
        file: the image.
        classes: names of the labels.
        top: how many labels to return.

    Raises:
        MixheadError: where the image cannot be read; it names the file.
    """
    pixels_1CYX = processor([read_image(file)], return_tensors="pt")["pixel_values"]
    with keep_routing(model) as log:
        probabilities_L = logits_of(model, pixels_1CYX)[0].softmax(-1)
    likeliest = probabilities_L.topk(min(top, len(classes)))
    grid_of = partial(patch_grid, model.config, pixels_1CYX.shape[-2:])
    maps = tuple(head_map(name, routing, grid_of(routing.selected_BNH.shape[1])) for name, routing in log.layers)
    used = sum(float(routing.selected_BNH.sum(-1).float().mean()) for _, routing in log.layers)
    heads = sum(routing.selected_BNH.shape[-1] for _, routing in log.layers)
    dense = max(0, heads_of(model) - heads)
    return Classification(
        file=str(file),
        labels=tuple(classes[number] for number in likeliest.indices.tolist()),
        probabilities=tuple(likeliest.values.tolist()),
        used=used + dense,
        heads=heads + dense,
        maps=maps,
        pixels_CYX=pixels_1CYX[0],
    )


def head_map(layer: str, routing: Routing, grid: tuple[int, int]) -> HeadMap:
    """The routing of the only image of a batch on its map; class and register tokens in front are left out."""
    patches = slice(routing.selected_BNH.shape[1] - math.prod(grid), None)
    return HeadMap(
        layer=layer,
        selected_YXH=routing.selected_BNH[0, patches].unflatten(0, grid),
        gates_YXH=routing.gates_BNH[0, patches].float().unflatten(0, grid),
    )
