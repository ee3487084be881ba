"""Image classification: a MoH-ViT, or any converted model, trained on a folder of images, a dataset, or Fashion-MNIST.

The defaults are the published MoH-ViT recipe (arXiv 2410.11842, appendix B.1). Several processes, also on several
machines: start `mixhead` with `torchrun`.
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, set_seed
from transformers.image_processing_base import ImageProcessingMixin

from mixhead.data.image_batches import refuse_unreadable
from mixhead.data.labelled_images import LabelledImages, open_both
from mixhead.errors import MixheadError
from mixhead.files import write_folder
from mixhead.models.moh_vit import MoHTransNeXtConfig, MoHTransNeXtForImageClassification, image_processor
from mixhead.tasks.image_classification.config import ImageTrainConfig
from mixhead.tasks.image_classification.distiller import ImageDistiller
from mixhead.tasks.image_classification.evaluate import evaluate_images, load_classifier
from mixhead.tasks.image_classification.trainer import Evaluations, ImageTrainer
from mixhead.training.recipes import Recipe, settings_from
from mixhead.training.run import open_run, run_training
from mixhead.training.trainer import TrainingResult


def train(recipe: Recipe, run: Path, *, resume: bool = False) -> TrainingResult:
    """Trains what the recipe says and measures it on the test images.

    Args:
        recipe: with the settings of `ImageTrainConfig`.
        run: folder of the run.
        resume: continues the run in that folder.

    Raises:
        MixheadError: where settings or data cannot be used, the loss becomes NaN, or the disk is full.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint.
    """
    config = settings_from(ImageTrainConfig, recipe.values)
    train_images, test_images = open_both(config.data)
    if config.unreadable == "refuse":
        for images in (train_images, test_images):
            refuse_unreadable(images)
    set_seed(config.seed)
    model, processor = starting_model(config, train_images.classes)
    trainer = trainer_for(config, model, processor, train_images, run)
    passport = {"recipe": recipe.name, "task": recipe.task, **recipe.values}
    done = open_run(trainer, "recipe.json", passport, resume)
    if config.evaluate_every:
        trainer.add_callback(Evaluations(trainer, test_images))
    seconds = run_training(trainer, done)
    folder = save_model(trainer)
    metrics: dict[str, float | int | str] = {"training images": trainer.args.max_steps * trainer.units_per_step}
    metrics["training seconds"] = round(seconds, 1)
    if trainer.accelerator.is_main_process:
        metrics |= measured(folder, test_images, trainer.bf16_autocast)
    trainer.accelerator.wait_for_everyone()
    return TrainingResult(folder, metrics)


def trainer_for(
    config: ImageTrainConfig,
    model: PreTrainedModel,
    processor: ImageProcessingMixin,
    images: LabelledImages,
    run: Path,
) -> ImageTrainer:
    """The trainer that learns the labels, or the one that keeps a teacher's hidden states."""
    if config.teacher is None:
        return ImageTrainer(model, processor, config, images, run)
    teacher, _, _ = load_classifier(config.teacher)
    return ImageDistiller(model, processor, teacher, config=config, images=images, run=run)


def measured(folder: Path, images: LabelledImages, bf16: bool) -> dict[str, float | int | str]:
    """Accuracy of the saved model."""
    model, processor, _classes = load_classifier(folder)
    result = evaluate_images(model, processor, images, 256, autocast=torch.bfloat16 if bf16 else None)
    return {
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
    known_fields = {f.name for f in fields(MoHTransNeXtConfig)}
    unknown = [name for name in settings if name not in known_fields | {"name"}]
    if unknown:
        raise MixheadError(f"The recipe has an unknown key model.{unknown[0]}: MoHTransNeXtConfig has no such field.")
    labels = {
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
    }
    name = settings.pop("name", None)
    make = MoHTransNeXtConfig if name is None else partial(MoHTransNeXtConfig.named, name)
    sizes = make(**settings, **labels)
    return MoHTransNeXtForImageClassification(sizes), image_processor(sizes, config.crop_share)


def save_model(trainer: ImageTrainer) -> Path:
    """Writes the trained model and its image processor, whole or not at all."""
    folder = trainer.run_folder / "model"
    state = trainer.accelerator.get_state_dict(trainer.model)

    def write(partial_folder: Path) -> None:
        trainer.base_model.save_pretrained(partial_folder, state_dict=state)
        trainer.processor.save_pretrained(partial_folder)

    if trainer.accelerator.is_main_process:
        write_folder(folder, write)
    trainer.accelerator.wait_for_everyone()
    return folder
