"""Image classification: a MoH-ViT, or any converted model, trained on a folder of images, a dataset, or Fashion-MNIST.

The defaults are the published MoH-ViT recipe (arXiv 2410.11842, appendix B.1). Several processes, also on several
machines: start `mixhead` with `torchrun`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, set_seed
from transformers.image_processing_base import ImageProcessingMixin

from mixhead.data.image_batches import refuse_unreadable
from mixhead.data.labelled_images import open_both
from mixhead.errors import MixheadError
from mixhead.models.moh_vit import MoHTransNeXtConfig, MoHTransNeXtForImageClassification, image_processor
from mixhead.tasks.image_classification.config import ImageTrainConfig
from mixhead.tasks.image_classification.distiller import ImageDistiller
from mixhead.tasks.image_classification.evaluate import evaluate_images, load_classifier
from mixhead.tasks.image_classification.trainer import ImageTrainer
from mixhead.training.recipes import refuse_unknown_fields
from mixhead.training.run import Metrics


def build(config: ImageTrainConfig, run: Path) -> ImageTrainer:
    """The trainer for a recipe: it learns the labels, or keeps a teacher's hidden states.

    Raises:
        MixheadError: where settings or data cannot be used.
    """
    train_images, test_images = open_both(config.data)
    if config.unreadable == "refuse":
        for images in (train_images, test_images):
            refuse_unreadable(images)
    set_seed(config.seed)
    model, processor = starting_model(config, train_images.classes)
    if config.teacher is None:
        return ImageTrainer(model, processor, config, train_images, test_images, run)
    teacher, _, _ = load_classifier(config.teacher)
    return ImageDistiller(model, processor, teacher, config=config, images=train_images, tests=test_images, run=run)


def measure(trainer: ImageTrainer, folder: Path) -> Metrics:
    """Accuracy of the saved model on the test images."""
    model, processor, _classes = load_classifier(folder)
    autocast = torch.bfloat16 if trainer.bfloat16 else None
    result = evaluate_images(model, processor, trainer.tests, 256, autocast=autocast)
    return {
        "training images": trainer.args.max_steps * trainer.units_per_step,
        "test images": result.images,
        "top-1 (%)": round(100 * result.top1_accuracy, 2),
        "top-5 (%)": round(100 * result.top5_accuracy, 2),
        "heads used (%)": round(100 * result.active_share, 2),
    }


def starting_model(config: ImageTrainConfig, classes: tuple[str, ...]) -> tuple[PreTrainedModel, ImageProcessingMixin]:
    """The model before the first step, and how images are prepared for it.

    Raises:
        MixheadError: where the settings of the model are unknown, or a saved one knows other classes.
    """
    settings = dict(config.model)
    if "folder" in settings:
        if len(settings) > 1:
            raise MixheadError("model.folder is a whole model: leave out all other settings of the model.")
        model, processor, known = load_classifier(settings["folder"])
        if known != classes:
            raise MixheadError(
                f"The model in {settings['folder']} knows other classes than the data, or in another order."
            )
        return model, processor
    name = settings.pop("name", None)
    refuse_unknown_fields(MoHTransNeXtConfig, settings)
    labels = {
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
    }
    make = MoHTransNeXtConfig if name is None else partial(MoHTransNeXtConfig.named, name)
    sizes = make(**settings, **labels)
    return MoHTransNeXtForImageClassification(sizes), image_processor(sizes, config.crop_share)
