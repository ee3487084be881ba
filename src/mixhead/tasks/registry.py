"""Which tasks can be trained: the name in a recipe, and the function that trains it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mixhead.errors import MixheadError
from mixhead.tasks.image_classification import train as image_classification
from mixhead.tasks.image_generation import small_classifier
from mixhead.tasks.image_generation import train as class_conditional_generation
from mixhead.tasks.masked_lm import train as masked_lm
from mixhead.tasks.translation import train as translation
from mixhead.training.recipes import Recipe
from mixhead.training.trainer import TrainingResult


class Train(Protocol):
    """What a task is to the command line: a recipe in, a trained model out."""

    def __call__(self, recipe: Recipe, run: Path, *, resume: bool = False) -> TrainingResult: ...


TASKS: dict[str, Train] = {
    "class_conditional_generation": class_conditional_generation.train,
    "image_classification": image_classification.train,
    "masked_lm": masked_lm.train,
    "small_classifier": small_classifier.train,
    "translation": translation.train,
}


def train_recipe(recipe: Recipe, run: Path, *, resume: bool = False) -> TrainingResult:
    """Trains what a recipe describes.

    Raises:
        MixheadError: where no such task can be trained.
    """
    if recipe.task not in TASKS:
        known = ", ".join(TASKS)
        raise MixheadError(f"The recipe's task {recipe.task!r} cannot be trained: choose one of {known}.")
    return TASKS[recipe.task](recipe, run, resume=resume)
