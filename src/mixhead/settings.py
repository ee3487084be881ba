"""`Settings`: dataclasses whose values pydantic checks against their annotations; what it refuses is a `MixheadError`.

Nothing here loads PyTorch, or pydantic before a value is checked: the command line reads the defaults.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from mixhead.errors import MixheadError

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0), Lt(math.inf)]
NotNegative = Annotated[float, Ge(0), Lt(math.inf)]
Share = Annotated[float, Ge(0), Lt(1)]
Probability = Annotated[float, Ge(0), Le(1)]

# What is wrong with a value, by the type of pydantic's error; its bounds are filled in.
REASONS = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "is unknown: choose one of {expected}",
}


@dataclass(frozen=True, eq=False)
class Source:
    """Marks a setting that names data or a model: a path becomes absolute, so that it means the same from everywhere.

    Attributes:
        names: what is known by name and is therefore no path.
    """

    names: Container[str] = ()


@dataclass(frozen=True)
class Settings:
    """A dataclass whose values pydantic checks against their annotations.

    Raises:
        MixheadError: where a value has another type or is out of range.
    """

    def __post_init__(self) -> None:
        from pydantic import ValidationError

        cls: Any = type(self)
        for name, adapter in _adapters(cls).items():
            try:
                value = adapter.validate_python(getattr(self, name))
            except ValidationError as error:
                raise MixheadError("; ".join(sentence(detail, name) for detail in error.errors()) + ".") from error
            object.__setattr__(self, name, value)
        for name, source in _sources(cls).items():
            object.__setattr__(self, name, absolute(getattr(self, name), source.names))


def absolute(value: Any, names: Container[str] = ()) -> Any:
    """A setting with its paths made absolute: PATH, PATH:part, PATH,PATH, values of a mapping; the rest as it is."""
    if isinstance(value, Mapping):
        return {key: absolute(entry, names) for key, entry in value.items()}
    if not isinstance(value, str):
        return value
    return ",".join(_absolute_path(piece, names) for piece in value.split(","))


def _absolute_path(text: str, names: Container[str]) -> str:
    name, colon, part = text.rpartition(":")
    for path, rest in ((text, ""), (name, colon + part)):
        if path in names:
            return text
        if path and Path(path).exists():
            return f"{Path(path).absolute()}{rest}"
    return text


def sentence(detail: Mapping[str, Any], where: str = "") -> str:
    """What is wrong with a setting, from an error of pydantic; without a full stop.

    Args:
        detail: the error.
        where: the key that holds what was checked.
    """
    place = ".".join([*([where] if where else []), *(str(part) for part in detail["loc"])])
    context = detail.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, MixheadError):
        return f"{place}: {cause}".removeprefix(": ").removesuffix(".")
    if detail["type"] == "missing":
        return f"The recipe lacks the key {place}"
    reason = REASONS.get(detail["type"], f"cannot be used ({detail['msg']})").format(**context)
    reason = reason.replace("more than 0", "a positive number").replace("less than inf", "a finite number")
    return f"{place or 'settings'}={detail['input']!r} {reason}"


@cache
def _adapters(cls: Any) -> dict[str, Any]:
    """What checks each field."""
    from pydantic import TypeAdapter

    return {name: TypeAdapter(hint) for name, hint in get_type_hints(cls, include_extras=True).items()}


@cache
def _sources(cls: Any) -> dict[str, Source]:
    """The fields that name data."""
    hints = get_type_hints(cls, include_extras=True)
    marks = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: mark for name, found in marks.items() for mark in found if isinstance(mark, Source)}
