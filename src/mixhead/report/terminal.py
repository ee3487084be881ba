"""A recording in a terminal: sentences, the map of loads, and the text with a strip of heads for every token."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from mixhead.recording.names import short_names
from mixhead.report.contents import Axis, Contents
from mixhead.report.html import competing_heads, most_telling, shared_of, short_title, subtitle
from mixhead.report.statistics import in_words

# From light to full, so that the map can be read without colours too.
SHADES = " ░▒▓█"
JOINERS = "\u200c\u200d"  # inside words and emoji
WIDEST = 6  # characters of a column
COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#8c9eff", "#bbbbbb")


def terminal_view(contents: Contents, layer: str | None = None, most_tokens: int = 200) -> RenderableType:
    """Everything that fits into a terminal.

    Args:
        contents: what to show.
        layer: whose heads stand beside the tokens; by default the one whose heads tell most.
        most_tokens: how many tokens are shown.
    """
    names = contents.recording.layers
    layer = most_telling(contents) if layer is None else layer
    short = dict(zip(names, short_names(names), strict=True))
    sentences = in_words({short_title(short[name]): contents.loads[name] for name in names}, shared_of(contents, short))
    parts: list[RenderableType] = [Text(subtitle(contents), style="bold"), *(Text(f"• {s}") for s in sentences), Text()]
    parts += [load_map(contents, [short[name] for name in names]), Text()]
    axis = next(axis for axis in contents.axes if layer in axis.layers)
    if axis.kind == "text":
        parts += [Text(f"Tokens and their heads in {short_title(short[layer])}", style="bold")]
        parts += [token_lines(contents, axis, layer, most_tokens)]
    return Group(*parts)


def load_map(contents: Contents, short: Sequence[str]) -> Text:
    """Heads down, layers across; a darker cell is used by more tokens."""
    loads = [contents.loads[name].share_H for name in contents.recording.layers]
    text = Text(
        "Load of every head  (" + "  ".join(f"{s or ' '}{s or ' '} {25 * i}%" for i, s in enumerate(SHADES)) + ")\n"
    )
    numbers = [str(number) for number in range(len(short))]
    columns = [*short] if max(map(len, short)) <= WIDEST else numbers
    if columns != [*short]:  # the names would not fit beside each other
        named = (f"{column} {name}" for column, name in zip(columns, short, strict=True))
        text.append(f"layers: {', '.join(named)}\n", style="dim")
    width = max(map(len, columns)) + 1
    text.append("head ".rjust(6) + "".join(name.rjust(width) for name in columns) + "\n", style="dim")
    for head in range(max(map(len, loads))):
        text.append(f"{head:>5} ", style="dim")
        for load_H in loads:
            shade = SHADES[round(4 * load_H[head])] if head < len(load_H) else "·"
            text.append(" " + shade * (width - 1), style="blue" if head < len(load_H) else "dim")
        text.append("\n")
    return text


def token_lines(contents: Contents, axis: Axis, layer: str, most: int) -> Text:
    """Each token in the colour of the rarest head that it used, with the numbers of its heads."""
    place = axis.layers.index(layer)
    start = sum(len(contents.loads[name].share_H) for name in axis.layers[:place])
    load_H = contents.loads[layer].share_H
    competing = competing_heads(contents, layer)
    used_TH = axis.codes_TX[:, start : start + len(load_H)] > 0
    text = Text()
    for sequence in axis.sequences:
        if sequence.first >= most:
            text.append(f"… {len(axis.texts) - most:,} more tokens\n", style="dim")
            break
        text.append(f"\n{sequence.title}\n", style="dim")
        for token in range(sequence.first, min(sequence.first + sequence.count, most)):
            used = [head for head in competing if used_TH[token, head] and load_H[head] < 0.999]
            style = "" if not used else COLOURS[competing.index(min(used, key=lambda h: load_H[h])) % len(COLOURS)]
            text.append(printable(axis.texts[token]), style=style)
            if len(load_H) <= 16:
                text.append("".join(digits(np.flatnonzero(used_TH[token]))), style="dim")
        text.append("\n")
    return text


def digits(heads: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.intp]]) -> str:
    """Small numbers behind a word."""
    return "".join("₀₁₂₃₄₅₆₇₈₉ₐᵦ꜀ᵈₑ𝒻"[head] for head in heads)


def printable(piece: str) -> str:
    """A piece without what would move the cursor of a terminal."""
    return "".join(c if stays_in_place(c) else {"\n": "↵", "\t": "⇥"}.get(c, "�") for c in piece)


def stays_in_place(sign: str) -> bool:
    """Whether a character is shown and nothing else; so are those that this Python knows nothing of, and joiners."""
    return sign.isprintable() or sign in JOINERS or unicodedata.category(sign) in ("Co", "Cn")
