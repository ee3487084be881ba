"""Short names of layers: what tells them apart."""

from __future__ import annotations

from collections.abc import Sequence

from mixhead.errors import MixheadError


def short_names(names: Sequence[str]) -> list[str]:
    """`model.layers.3.self_attn` becomes `3` among its like: parts that are the same in all names are left out."""
    if not names:
        return []
    if len(names) == 1:
        digits = [part for part in names[0].split(".") if part.isdigit()]
        return [".".join(digits) or names[0]]
    parts = [name.split(".") for name in names]
    if len({len(of) for of in parts}) == 1:
        differing = [i for i, column in enumerate(zip(*parts, strict=True)) if len({*column}) > 1]
        return [".".join(of[i] for i in differing) for of in parts]
    first, last = _shared(parts), _shared([of[::-1] for of in parts])
    return [".".join(of[first : len(of) - last] or of) for of in parts]


def short_name(name: str, among: Sequence[str]) -> str:
    """The short name of one of these layers."""
    return dict(zip(among, short_names(among), strict=True))[name]


def layer_named(name: str, among: Sequence[str]) -> str:
    """The layer of that name, long or short.

    Raises:
        MixheadError: where there is none.
    """
    known = {**{layer: layer for layer in among}, **dict(zip(short_names(among), among, strict=True))}
    if name not in known:
        raise MixheadError(f"No layer {name!r} routes: choose one of {', '.join(short_names(among)) or 'none'}.")
    return known[name]


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many parts all names begin with."""
    count = 0
    for column in zip(*parts, strict=False):
        if len({*column}) > 1:
            break
        count += 1
    return count
