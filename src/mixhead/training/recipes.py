"""Recipes: one YAML file per experiment, and the frozen dataclasses that a task makes of it.

A recipe names its task and holds that task's settings; every key is explained by a comment. Those that come with
mixhead lie in `mixhead/recipes`; any other file of the same form does as well.
"""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from mixhead.errors import MixheadError, first_line
from mixhead.settings import sentence

SUFFIX = ".yaml"

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Recipe:
    """An experiment.

    Attributes:
        name: of the recipe; the default name of its run.
        task: which of `mixhead.tasks` it is, see `registry`.
        values: the settings of that task, as nested mappings.
    """

    name: str
    task: str
    values: Mapping[str, Any]


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with mixhead: name and file, sorted by name."""
    folder = Path(str(importlib.resources.files("mixhead"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}"))}


def recipe_file(name: str) -> Path:
    """The file behind the name of a shipped recipe, or behind a path.

    Raises:
        MixheadError: where there is none.
    """
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.is_file():
        return path
    near = difflib.get_close_matches(name, shipped, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise MixheadError(f"{name} is neither a file nor a recipe of mixhead; `mixhead recipes ls` lists those.{hint}")


def summary(path: Path) -> str:
    """What a recipe is, in the words of its first line, a comment."""
    with path.open(encoding="utf-8") as file:
        return file.readline().strip().lstrip("# ")


def read_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and replaces single values in it.

    Args:
        name: of a shipped recipe, or the path of a file.
        overrides: `key=value` or `part.key=value`; the value is read as YAML.

    Raises:
        MixheadError: where there is no such recipe, it is no YAML mapping with a task, or an override is malformed.
    """
    path = recipe_file(name)
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MixheadError(f"The recipe {path} is no YAML ({error}).") from error
    if not isinstance(values, dict) or not isinstance(values.get("task"), str):
        raise MixheadError(f"The recipe {path} must be a mapping whose key `task` names what is trained.")
    for override in overrides:
        _replace(values, override)
    task = values.pop("task")
    return Recipe(name=path.stem, task=task, values=values)


def parse_yaml(text: str) -> Any:
    """What a text in YAML says.

    Raises:
        yaml.YAMLError: where it is none, also where a date does not exist or lists are nested beyond all measure.
    """
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:  # whose own words quote the text, over many lines
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise yaml.YAMLError(f"{error.problem} in line {line}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise yaml.YAMLError(first_line(error)) from error


def settings_from(cls: type[Settings], values: Mapping[str, Any], where: str = "") -> Settings:
    """A (nested) dataclass from a mapping; numbers that YAML reads as text, like 1e-3, become numbers.

    Args:
        cls: a dataclass; its fields may be dataclasses.
        values: its values. Those that are left out keep their defaults.
        where: the key that holds these values in the recipe, for messages.

    Raises:
        MixheadError: where a key is unknown or missing, or a value has another type or is refused by the class.
    """
    _refuse_unknown(cls, values, where)
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise MixheadError("; ".join(sentence(detail, where) for detail in error.errors()) + ".") from error


def refuse_unknown_fields(cls: type, model: Mapping[str, Any]) -> None:
    """Refuses what a recipe says of a model where the class of its configuration has no such field."""
    known = {field.name for field in fields(cls)}
    for name in model:
        if name not in known:
            raise MixheadError(f"The recipe has an unknown key model.{name}: {cls.__name__} has no such field.")


def _replace(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *parts, last = key.split(".")
    if not equals or not last:
        raise MixheadError(f"`{override}` must have the form key=value, or part.key=value.")
    for part in parts:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise MixheadError(f"`{override}`: {part} is a value of the recipe and has no keys of its own.")
    try:
        values[last] = parse_yaml(text)
    except yaml.YAMLError as error:
        raise MixheadError(f"`{override}`: the value is no YAML ({error}).") from error


def _refuse_unknown(cls: type, values: Mapping[str, Any], where: str) -> None:
    if not isinstance(values, Mapping):
        raise MixheadError(f"{where or 'The recipe'} must be a mapping of settings, but it is {values!r}.")
    kinds = get_type_hints(cls)
    names = [field.name for field in fields(cls)]
    for key, value in values.items():
        place = f"{where}.{key}" if where else str(key)
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names)}."
            raise MixheadError(f"The recipe has an unknown key {place}: {hint}")
        for kind in (kinds[key], *get_args(kinds[key])):
            if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, Mapping):
                _refuse_unknown(kind, value, place)
