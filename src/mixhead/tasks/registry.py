"""Which tasks can be trained: name in a recipe, settings, how the trainer is built, how its model is measured."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mixhead.errors import MixheadError
from mixhead.tasks.image_classification import train as image_classification
from mixhead.tasks.image_classification.config import ImageTrainConfig
from mixhead.tasks.image_generation import small_classifier
from mixhead.tasks.image_generation import train as image_generation
from mixhead.tasks.image_generation.config import GenerationConfig
from mixhead.tasks.image_generation.small_classifier import ClassifierConfig
from mixhead.tasks.language_modelling import train as language_modelling
from mixhead.tasks.language_modelling.config import LanguageModellingConfig
from mixhead.tasks.masked_lm import train as masked_lm
from mixhead.tasks.masked_lm.train import MaskedLMConfig
from mixhead.tasks.translation import train as translation
from mixhead.tasks.translation.train import TranslationConfig
from mixhead.training.folder import check_new_run
from mixhead.training.former import todays_keys
from mixhead.training.lock import check_unused
from mixhead.training.recipes import Recipe, settings_from
from mixhead.training.run import Task, TrainingResult, train

logger = logging.getLogger(__name__)

TASKS: dict[str, Task[Any]] = {
    "class_conditional_generation": Task(GenerationConfig, image_generation.build, image_generation.measure),
    "image_classification": Task(ImageTrainConfig, image_classification.build, image_classification.measure),
    "language_modelling": Task(LanguageModellingConfig, language_modelling.build, language_modelling.measure),
    "masked_lm": Task(MaskedLMConfig, masked_lm.build, masked_lm.measure),
    "small_classifier": Task(ClassifierConfig, small_classifier.build, small_classifier.measure),
    "translation": Task(TranslationConfig, translation.build, translation.measure),
}


def task_of(recipe: Recipe) -> Task[Any]:
    """The task that a recipe names.

    Raises:
        MixheadError: where no such task can be trained.
    """
    if recipe.task not in TASKS:
        known = ", ".join(TASKS)
        raise MixheadError(f"The recipe's task {recipe.task!r} cannot be trained: choose one of {known}.")
    return TASKS[recipe.task]


def settings_of(recipe: Recipe) -> Any:
    """The settings of a recipe, checked; those that it leaves out have their defaults.

    Raises:
        MixheadError: where a key is unknown, or a value cannot be used.
    """
    config = task_of(recipe).config
    values, said = todays_keys(recipe.task, recipe.values, config)
    if said:
        logger.warning("The recipe is written for an earlier version: %s.", "; ".join(said))
    return settings_from(config, values)


def train_recipe(recipe: Recipe, run: Path, *, resume: bool = False) -> TrainingResult:
    """Trains what a recipe describes, and measures it.

    Args:
        recipe: its task, and the settings of that task.
        run: folder of the run.
        resume: continues the run in that folder.

    Raises:
        MixheadError: where settings or data cannot be used, the loss becomes NaN, or the disk is full. The checkpoints
            that were complete stay.
        KeyboardInterrupt: after Ctrl-C, when the running step has ended and a checkpoint is written.
        SystemExit: with code 143, after SIGTERM, likewise.
    """
    task = task_of(recipe)
    if resume:
        check_unused(run)
    else:
        check_new_run(run)
    trainer = task.build(settings_of(recipe), run)
    return train(trainer, recipe.task, resume, measure=task.measure)
