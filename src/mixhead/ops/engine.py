"""An engine is a value: a name, what it computes, and why it cannot take some arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from mixhead.errors import MixheadError

Run = TypeVar("Run")
Mask = Tensor | None  # of attention, with 4 dimensions: bool, or added to the scores


def never(*arguments: object) -> str | None:
    """The refusal of an engine that takes everything."""
    return None


@dataclass(frozen=True)
class Engine(Generic[Run]):
    """One way to compute an operator.

    Attributes:
        name: what `impl=` says.
        run: from the operator's checked arguments to its result; called where `refusal` is None.
        refusal: why it cannot take some arguments here, a sentence, or None; of which arguments, the operator says.
    """

    name: str
    run: Run
    refusal: Callable[..., str | None] = never


def table(*engines: Engine[Run]) -> dict[str, Engine[Run]]:
    """Engines by their names."""
    return {engine.name: engine for engine in engines}


def asked_for(impl: str, engines: Mapping[str, Engine[Run]], *arguments: object) -> Engine[Run]:
    """The engine of that name.

    Raises:
        MixheadError: where there is none, or where it refuses the arguments: none becomes another one in silence.
    """
    if impl not in engines:
        raise MixheadError(f"impl={impl!r} is unknown: choose 'auto' or one of {', '.join(engines)}.")
    if why := engines[impl].refusal(*arguments):
        raise MixheadError(f"impl={impl!r} cannot take these arguments: {why}.")
    return engines[impl]
