"""The image processor of MoH-ViT: how the published models are evaluated."""

from __future__ import annotations

from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import is_torchvision_available

from mixhead.errors import MixheadError
from mixhead.models.moh_vit.configuration import MoHTransNeXtConfig

CROP_SHARE = 0.875
BICUBIC = 3  # as Pillow numbers them


def image_processor(config: MoHTransNeXtConfig, crop_share: float = CROP_SHARE) -> ImageProcessingMixin:
    """Bicubic resize of the shorter side, centre crop of 87.5% (256 to 224 pixels), ImageNet's mean and deviation.

    Args:
        config: of the model; its `image_size` is what the crop has.
        crop_share: side of the crop as a share of the resized shorter side; 1 keeps all of it.

    Raises:
        MixheadError: where Pillow is not installed.
    """
    try:
        if is_torchvision_available():
            from transformers.models.bit.image_processing_bit import BitImageProcessor as Processor
        else:
            from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil as Processor
        return Processor(
            size={"shortest_edge": int(config.image_size / crop_share)},
            crop_size={"height": config.image_size, "width": config.image_size},
            resample=BICUBIC,
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
        )
    except ImportError as error:
        raise MixheadError("Images need Pillow: install it with `pip install 'mixhead[vision]'`.") from error
