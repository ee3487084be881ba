"""What calibration is given, checked before the model sees it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from mixhead.errors import MixheadError, listed
from mixhead.models.context import check_ids, check_length

Batch = Tensor | Mapping[str, Any]
IDS = "input_ids"


def checked_batches(model: nn.Module, batches: Iterable[Batch]) -> list[dict[str, Any]]:
    """Each batch as keyword arguments of the model; a tensor is the model's main input.

    Raises:
        MixheadError: where there is none, or something that the model cannot take.
    """
    if isinstance(batches, str | bytes | Mapping | Tensor | np.ndarray) or not isinstance(batches, Iterable):
        raise MixheadError(
            f"batches must be a list of batches, each a tensor or a mapping of keyword arguments, but it is a "
            f"{type(batches).__name__}: {hint_for(batches)}"
        )
    checked = [checked_batch(model, batch) for batch in batches]
    if not checked:
        raise MixheadError("batches is empty: calibration needs at least one batch of real inputs.")
    return checked


def hint_for(given: object) -> str:
    """What to give instead, the end of a sentence."""
    if isinstance(given, str | bytes):
        return "cut the text into token ids with the model's tokenizer."
    return "give [batch], or tensor.split(4) of many inputs." if isinstance(given, Tensor) else "give [batch]."


def checked_batch(model: nn.Module, batch: Any) -> dict[str, Any]:
    """One batch as keyword arguments."""
    if isinstance(batch, Tensor):
        batch = {main_input(model): batch}
    if not isinstance(batch, Mapping):
        raise MixheadError(
            f"A batch must be a tensor, or a mapping of keyword arguments of {type(model).__name__}, but it is a "
            f"{type(batch).__name__}: "
            + (
                hint_for(batch)
                if isinstance(batch, str)
                else f"give {{{main_input(model)!r}: tensor}}, with what else the model takes."
            )
        )
    check_names(model, batch)
    for name, value in batch.items():
        if isinstance(value, str) or (isinstance(value, list | tuple) and any(isinstance(part, str) for part in value)):
            raise MixheadError(f"{name!r} of a batch holds text: {hint_for('')}")
        if name == main_input(model) and not isinstance(value, Tensor):
            raise MixheadError(
                f"{name!r} of a batch must be a tensor, but it is a {type(value).__name__}: tokenizers and processors "
                "make tensors with return_tensors='pt'."
            )
    if isinstance(batch.get(IDS), Tensor):
        check_token_ids(model, batch[IDS])
    pixels = batch.get("pixel_values")
    if isinstance(pixels, Tensor) and not pixels.is_floating_point():
        raise MixheadError(
            f"'pixel_values' must be floating numbers, as the image processor makes them, not {pixels.dtype}."
        )
    return dict(batch)


def main_input(model: nn.Module) -> str:
    """The name of what a model reads, or the first argument of its call."""
    name = getattr(model, "main_input_name", None)
    return str(name) if name is not None else next(iter(inspect.signature(model.forward).parameters))


def check_names(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Raises where the model takes no argument of that name, or an argument that it cannot do without is missing."""
    # Of the class: what hooks put in the place of the model's own forward takes anything.
    parameters = dict([*inspect.signature(type(model).forward).parameters.items()][1:])
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [] if open_ended else [name for name in batch if name not in parameters]
    plain = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    wanted = [name for name, of in parameters.items() if of.default is inspect.Parameter.empty and of.kind not in plain]
    missing = [name for name in wanted if name not in batch]
    if unknown or missing:
        raise MixheadError(
            f"A batch does not fit {type(model).__name__}: unknown {listed(unknown)}, missing {listed(missing)}. Give "
            "what its call takes."
        )


def check_token_ids(model: nn.Module, ids_BN: Tensor) -> None:
    """Raises where these are no token ids of the model, [B, N], or [B, choices, N] of one that chooses among texts."""
    if ids_BN.is_floating_point():
        raise MixheadError(
            f"A batch of token ids must hold integers, but it is {ids_BN.dtype} of shape {list(ids_BN.shape)}: "
            f"{type(model).__name__} reads text. Give images under the name of their argument."
        )
    chooses = type(model).__name__.endswith(("ForMultipleChoice", "DoubleHeadsModel"))
    if ids_BN.dim() != 2 and not (chooses and ids_BN.dim() == 3):
        raise MixheadError(f"A batch of token ids must have the shape [texts, tokens], not {list(ids_BN.shape)}.")
    check_ids(model, ids_BN)
    check_length(model, ids_BN.shape[-1], "A batch")
