"""Training without labels: a converted classifier keeps the final hidden states of the dense model it came from."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from mixhead.errors import MixheadError
from mixhead.tasks.image_classification.trainer import ImageTrainer
from mixhead.training.health import HEALTH
from mixhead.training.trainer import PartOfStep


class ImageDistiller(ImageTrainer):
    """The distance of the student's final hidden states from its teacher's, and the balance loss of the routers.

    Final norm and head take no part and stay as they are. Positions are compared after a layer norm without weights, as
    the targets of data2vec are (arXiv 2202.03555, section 3.3), so that none outweighs the others by its norm.

    Args:
        model: the student.
        processor: prepares images for both.
        teacher: whose final hidden states have the student's shape.
        **settings: as for `ImageTrainer`.
    """

    columns = ("loss", "distance", *HEALTH)

    def __init__(
        self, model: PreTrainedModel, processor: ImageProcessingMixin, teacher: PreTrainedModel, **settings: Any
    ) -> None:
        # Final norm and head receive no gradient.
        super().__init__(model, processor, **settings, ddp_find_unused_parameters=True)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)

    def part_of_step(self, model: nn.Module, inputs: dict[str, Any], targets: Tensor | int | None) -> PartOfStep:
        """The distance of the hidden states."""
        del targets
        pixels_BCYX = inputs["pixel_values"]
        with torch.no_grad():
            wanted_BNC = final_states(self.teacher(pixel_values=pixels_BCYX, output_hidden_states=True))
        outputs, routings, coefficient = self.routed(model, pixels_BCYX, output_hidden_states=True)
        share = self.equal_share
        distance = normed_distance(final_states(outputs), wanted_BNC) * share
        return PartOfStep(distance, share, {"distance": distance}, routings, coefficient)


def final_states(outputs: Any) -> Tensor:
    """Hidden states after the last layer [B, N, C].

    Raises:
        MixheadError: where the model does not hand out hidden states of that form.
    """
    states = outputs.hidden_states
    if states is None or states[-1].dim() != 3:
        raise MixheadError("The model does not hand out final hidden states [images, patches, channels] to compare.")
    return states[-1]


def normed_distance(states_BNC: Tensor, wanted_BNC: Tensor) -> Tensor:
    """Mean squared difference, 0-d, after both were given mean 0 and variance 1 over the channels.

    The class token, which comes first, counts as much as all patches: what is built on a model reads it or their mean.

    Raises:
        MixheadError: where the shapes differ.
    """
    if states_BNC.shape != wanted_BNC.shape:
        raise MixheadError(
            f"The final hidden states of the teacher have the shape {list(wanted_BNC.shape)}, the student's "
            f"{list(states_BNC.shape)}: distillation needs the dense model that the student was converted from."
        )
    channels = states_BNC.shape[-1:]
    difference_BNC = F.layer_norm(states_BNC.float(), channels) - F.layer_norm(wanted_BNC.float(), channels)
    squares_BN = difference_BNC.square().mean(-1)
    return 0.5 * (squares_BN[:, 0].mean() + squares_BN[:, 1:].mean())
