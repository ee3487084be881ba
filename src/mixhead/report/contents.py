"""What a report shows, read off a recording: tokens, loads with their bands, groups, words, sentences.

Shape legend: T tokens, H heads, X heads of all layers of an axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mixhead.errors import MixheadError
from mixhead.report.statistics import (
    Bools,
    Floats,
    Load,
    agreement,
    blocks_of,
    co_activation,
    load_by,
    load_of,
    position_bins,
)
from mixhead.report.word_classes import word_class
from mixhead.report.word_statistics import expert_words
from mixhead.routing.recording import Recording, Tokens
from mixhead.tasks.pieces import readable

PLACE_LABELS = ("token", "x", "y")
MOST_GROUPS = 24
SAMPLE = 4096  # about so many tokens, evenly spread, tell how heads and layers go together
PATCHES = 10  # a patch is ten times less work for a browser than a token
LEAST_BITS = 0.005  # of mutual information; below, a word says nothing of a head


@dataclass(frozen=True)
class Shown:
    """One text or picture.

    Attributes:
        title: its name for the reader.
        first: row of its first token among the shown tokens of the axis.
        count: how many tokens it has.
        picture: which picture it is about; the same in all axes and time steps.
        time: the time step of a diffusion model, None elsewhere.
        grid: rows and columns of the patches; None for text.
        prefix: tokens before the patches that stand nowhere (a class token).
    """

    title: str
    first: int
    count: int
    picture: int
    time: float | None = None
    grid: tuple[int, int] | None = None
    prefix: int = 0


@dataclass(frozen=True)
class Axis:
    """Layers that routed the same tokens.

    Attributes:
        layers: their names.
        kind: "text" or "image".
        texts: what the shown tokens say, [T]; empty for images.
        sequences: the shown sequences.
        codes_TX: gates as bytes (0 = not used) of the shown tokens, the heads of all layers side by side.
    """

    layers: list[str]
    kind: str
    texts: list[str]
    sequences: list[Shown]
    codes_TX: NDArray[np.uint8]


@dataclass(frozen=True)
class Group:
    """Tokens that have something in common.

    Attributes:
        label: what they were grouped by: `task`, `position`, …
        value: what they have in common.
        loads: load of each layer among them.
    """

    label: str
    value: str
    loads: dict[str, Load]


@dataclass(frozen=True)
class Contents:
    """Everything that a report shows.

    Attributes:
        recording: where it comes from.
        loads: load of each layer among all tokens.
        axes: the tokens.
        groups: loads by what the tokens have in common.
        words: by layer, for each head the words that speak for it, with their PMI in bits.
        agreement: by pair of layers that routed the same tokens, how alike they sort them.
        together: by layer, the correlation of each two heads' use, [H, H].
        gates_vary: whether heads are weighted, and not only switched on and off.
        notes: what was left out of the report, as sentences.
    """

    recording: Recording
    loads: dict[str, Load]
    axes: list[Axis]
    groups: list[Group]
    words: dict[str, list[list[tuple[str, float]]]]
    agreement: dict[tuple[str, str], float]
    together: dict[str, Floats]
    gates_vary: bool
    notes: list[str] = field(default_factory=list)

    def groups_by(self, label: str) -> list[Group]:
        """The groups of one label."""
        return [group for group in self.groups if group.label == label]


def read_contents(recording: Recording, most_tokens: int = 10_000) -> Contents:
    """Reads a recording, layer by layer.

    Args:
        recording: of any size; all of it counts in the statistics.
        most_tokens: how many tokens of each axis are shown one by one.

    Raises:
        MixheadError: where no layer routed.
    """
    if not recording.layers:
        raise MixheadError("Nothing was recorded: the model routes in no layer. Convert it first (mixhead convert).")
    loads: dict[str, Load] = {}
    words: dict[str, list[list[tuple[str, float]]]] = {}
    alike: dict[tuple[str, str], float] = {}
    together: dict[str, Floats] = {}
    groups: dict[tuple[str, str], dict[str, Load]] = {}
    axes, notes, vary = [], [], False
    left = list(recording.layers)
    while left:
        layers = recording.same_tokens(left[0])
        left = [name for name in left if name not in layers]
        tokens = recording.tokens(layers[0])
        says = "token" in tokens.labels
        shown = shown_tokens(tokens, most_tokens if says else PATCHES * most_tokens)
        if len(shown) < len(tokens):
            notes.append(f"{len(shown):,} of {len(tokens):,} tokens are shown; all of them count in the figures.")
        axis_texts = texts_of(recording, tokens, np.arange(len(tokens))) if says else []
        labels = labels_of(recording, tokens, axis_texts)
        block_T, codes = blocks_of(tokens), []
        earlier: list[tuple[str, Bools]] = []
        for layer in layers:
            codes_TH = recording.codes(layer)
            selected_TH = codes_TH > 0
            loads[layer] = load_of(selected_TH, block_T)
            for label, (value_T, name_of) in labels.items():
                for value, load in load_by(selected_TH, value_T, block_T).items():
                    groups.setdefault((label, name_of(value)), {})[layer] = load
            if axis_texts:
                plain = [text.strip().lower() or "␣" for text in axis_texts]
                scored = expert_words(torch.from_numpy(selected_TH), plain, top=8, min_count=3)
                words[layer] = [[(s.word, s.pmi) for s in of if s.pmi > LEAST_BITS] for of in scored]
            sample_TH = selected_TH[:: max(1, len(selected_TH) // SAMPLE)]
            together[layer] = co_activation(sample_TH)
            for other, sample_TI in earlier:
                alike[other, layer] = agreement(sample_TI, sample_TH)
            earlier.append((layer, sample_TH))
            codes.append(codes_TH[shown])
            vary = vary or bool(((codes_TH > 1) & (codes_TH < 255)).any())
        kind = "text" if axis_texts else "image"
        texts = [axis_texts[i] for i in shown] if axis_texts else []
        axes.append(Axis(layers, kind, texts, sequences_of(recording, tokens, shown, kind), np.concatenate(codes, 1)))
    listed = [Group(label, value, of) for (label, value), of in groups.items()]
    return Contents(recording, loads, axes, listed, words, alike, together, vary, list(dict.fromkeys(notes)))


def shown_tokens(tokens: Tokens, most: int) -> NDArray[np.intp]:
    """Rows of the tokens that are shown, sequence by sequence: whole sequences, of which the last may be cut."""
    order = np.lexsort((tokens.position, tokens.sequence))
    return order[:most]


def texts_of(recording: Recording, tokens: Tokens, rows: NDArray[np.intp]) -> list[str]:
    """What each token says, characters whole; in the order of `rows`."""
    names = recording.names.get("token", {})
    ids = tokens.labels["token"]
    order = rows[np.lexsort((tokens.position[rows], tokens.sequence[rows]))]
    found = [""] * len(tokens)
    starts = np.flatnonzero(np.diff(tokens.sequence[order], prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(order)], strict=False):
        mine = order[start:end]
        pieces = [names.get(int(token), f"⟨{token}⟩" if token >= 0 else "⟨?⟩") for token in ids[mine]]
        for row, text in zip(mine, readable(pieces), strict=True):
            found[row] = text
    return [found[row] for row in rows]


def labels_of(
    recording: Recording, tokens: Tokens, texts: Sequence[str]
) -> dict[str, tuple[NDArray[Any], Callable[[Any], str]]]:
    """What tokens can be grouped by: the label of each, and the name of a label."""
    found: dict[str, tuple[NDArray[Any], Callable[[Any], str]]] = {}
    for label, value_T in tokens.labels.items():
        known_T = value_T[~np.isnan(value_T)] if value_T.dtype.kind == "f" else value_T[value_T != -1]
        if label in PLACE_LABELS or len(known_T) == 0:
            continue
        if len(np.unique(known_T)) <= MOST_GROUPS:
            names = recording.names.get(label, {})
            found[label] = value_T, lambda value, names=names: names.get(value, f"{value:g}")  # type: ignore[misc]
    if texts:
        classes = np.array([word_class(text) for text in texts])
        found["word class"] = classes, str
        bin_T, bins = position_bins(tokens.position)
        found["position"] = bin_T, bins.__getitem__
    return found


def sequences_of(recording: Recording, tokens: Tokens, shown: NDArray[np.intp], kind: str) -> list[Shown]:
    """The sequences among the shown tokens, in their order."""
    sequence_T = tokens.sequence[shown]
    first = np.flatnonzero(np.diff(sequence_T, prepend=-1))
    ends = [*first[1:], len(shown)]
    found = []
    diffuses = "time_step" in tokens.labels
    for number, (start, end) in enumerate(zip(first, ends, strict=False)):
        row = int(shown[start])
        picture = int(tokens.row[row]) if diffuses else int(tokens.sequence[row])
        groups = [
            recording.names[label][int(value_T[row])]
            for label, value_T in tokens.labels.items()
            if label in recording.names and label not in PLACE_LABELS and int(value_T[row]) in recording.names[label]
        ]
        what = "Picture" if kind == "image" else "Text"
        title = f"{what} {(picture if kind == 'image' else number) + 1}" + (f" ({', '.join(groups)})" if groups else "")
        time = float(tokens.labels["time_step"][row]) if diffuses else None
        grid, prefix = grid_of(tokens, shown[start:end]) if kind == "image" else (None, 0)
        found.append(Shown(title, int(start), int(end - start), picture, time, grid, prefix))
    return found


def grid_of(tokens: Tokens, rows: NDArray[np.intp]) -> tuple[tuple[int, int], int]:
    """Rows and columns of the patches of one picture, and how many tokens stand before them."""
    y_T, x_T = tokens.labels.get("y"), tokens.labels.get("x")
    if y_T is not None and x_T is not None and y_T[rows].min() >= 0:
        return (int(y_T[rows].max()) + 1, int(x_T[rows].max()) + 1), 0
    side = math.isqrt(len(rows))
    return (side, side), len(rows) - side * side
