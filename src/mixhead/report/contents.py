"""What a report shows, read off a recording: tokens, loads with their bands, groups, words, sentences.

Shape legend: T tokens, H heads, X heads of all layers of an axis.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mixhead.data.token_text import readable
from mixhead.errors import MixheadError
from mixhead.models.patches import GRIDS, halved
from mixhead.recording.file import Recording, Tokens
from mixhead.report.parts_of_speech import parts_of_speech
from mixhead.report.statistics import (
    BLOCK,
    Bools,
    Floats,
    Ints,
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
from mixhead.report.words import joined_words, word_numbers

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
        groups: by label that has names (`text`, `class`, `task`), what the sequence belongs to.
    """

    title: str
    first: int
    count: int
    picture: int
    time: float | None = None
    grid: tuple[int, int] | None = None
    prefix: int = 0
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Word:
    """The word that a token is in.

    Attributes:
        text: without the white space around it.
        speech: its part of speech; "" where it is not known.
    """

    text: str
    speech: str


@dataclass(frozen=True)
class Axis:
    """Layers that routed the same tokens.

    Attributes:
        layers: their names.
        kind: "text" or "image".
        texts: what the shown tokens say, [T]; empty for images.
        sequences: the shown sequences.
        observations: what counts as one observation, in the plural: "blocks of up to 64 tokens" or "pictures".
        codes_TX: gates as bytes (0 = not used) of the shown tokens, the heads of all layers side by side.
    """

    layers: list[str]
    kind: str
    texts: list[str]
    sequences: list[Shown]
    observations: str
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
    parts, left = [], list(recording.layers)
    while left:
        layers = recording.same_tokens(left[0])
        left = [name for name in left if name not in layers]
        parts.append(read_axis(recording, layers, most_tokens))
    return joined(parts)


def joined(parts: Sequence[Contents]) -> Contents:
    """The contents of several axes of one recording as one."""
    groups: dict[tuple[str, str], dict[str, Load]] = {}
    for part in parts:
        for group in part.groups:
            groups.setdefault((group.label, group.value), {}).update(group.loads)
    return Contents(
        recording=parts[0].recording,
        loads={name: load for part in parts for name, load in part.loads.items()},
        axes=[axis for part in parts for axis in part.axes],
        groups=[Group(label, value, loads) for (label, value), loads in groups.items()],
        words={name: words for part in parts for name, words in part.words.items()},
        agreement={pair: value for part in parts for pair, value in part.agreement.items()},
        together={name: values for part in parts for name, values in part.together.items()},
        gates_vary=any(part.gates_vary for part in parts),
        notes=list(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def read_axis(recording: Recording, layers: list[str], most_tokens: int) -> Contents:
    """The contents of layers that routed the same tokens."""
    tokens = recording.tokens(layers[0])
    says = "token" in tokens.labels
    kind = "text" if says else "image"
    texts = texts_of(recording, tokens) if says else []
    words = words_of_tokens(tokens, texts)
    labels = labels_of(recording, tokens, texts, words)
    shown = shown_tokens(tokens, most_tokens if says else PATCHES * most_tokens)
    codes = {layer: recording.codes(layer) for layer in layers}
    selected = {layer: codes_TH > 0 for layer, codes_TH in codes.items()}
    every = max(1, len(tokens) // SAMPLE)
    block_T = blocks_of(tokens) if says else pictures_of(tokens)
    axis = Axis(
        layers=layers,
        kind=kind,
        texts=[texts[row] for row in shown] if says else [],
        sequences=sequences_of(recording, tokens, shown, kind, what_of(recording, layers, kind)),
        observations=f"blocks of up to {BLOCK} tokens" if says else "pictures",
        codes_TX=np.concatenate([codes_TH[shown] for codes_TH in codes.values()], 1),
    )
    note = f"{len(shown):,} of {len(tokens):,} tokens are shown; all of them count in the figures."
    return Contents(
        recording=recording,
        loads={layer: load_of(used_TH, block_T) for layer, used_TH in selected.items()},
        axes=[axis],
        groups=[group for label, of in labels.items() for group in groups_of(label, *of, selected, block_T)],
        words={layer: telling_words(words, used_TH, block_T) for layer, used_TH in selected.items()} if says else {},
        agreement={
            (one, other): agreement(selected[one][::every], selected[other][::every])
            for one, other in itertools.combinations(layers, 2)
        },
        together={layer: co_activation(used_TH[::every]) for layer, used_TH in selected.items()},
        gates_vary=any(bool((codes_TH > 1).any()) for codes_TH in codes.values()),
        notes=[note] if len(shown) < len(tokens) else [],
    )


def pictures_of(tokens: Tokens) -> Ints:
    """The picture that each patch belongs to: one observation, however many patches and time steps it has."""
    return tokens.row if "time_step" in tokens.labels else tokens.sequence


def groups_of(
    label: str, value_T: NDArray[Any], name_of: Callable[[Any], str], selected: Mapping[str, Bools], block_T: Ints
) -> list[Group]:
    """The tokens of each value of a label, with the loads of all layers."""
    loads: dict[Any, dict[str, Load]] = {}
    for layer, used_TH in selected.items():
        for value, load in load_by(used_TH, value_T, block_T).items():
            loads.setdefault(value, {})[layer] = load
    return [Group(label, name_of(value), of) for value, of in loads.items()]


def telling_words(words: Sequence[Word], selected_TH: Bools, block_T: Ints) -> list[list[tuple[str, float]]]:
    """For each head the words that speak for it beyond chance, with their PMI in bits, best first."""
    spelled = [word.text.lower() or "␣" for word in words]
    scored = expert_words(torch.from_numpy(selected_TH), spelled, top=8, min_count=3, block_T=block_T)
    return [[(score.word, score.pmi) for score in of if score.pmi > LEAST_BITS] for of in scored]


def shown_tokens(tokens: Tokens, most: int) -> NDArray[np.intp]:
    """Rows of the tokens that are shown, sequence by sequence: whole sequences, of which the last may be cut."""
    return reading_order(tokens)[:most]


def texts_of(recording: Recording, tokens: Tokens) -> list[str]:
    """What each token says, characters whole."""
    names = recording.names.get("token", {})
    order = reading_order(tokens)
    found = [""] * len(tokens)
    starts = np.flatnonzero(np.diff(tokens.sequence[order], prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(order)], strict=False):
        rows = order[start:end]
        pieces = [names.get(int(number), f"⟨{number}⟩") for number in tokens.labels["token"][rows]]
        for row, text in zip(rows, readable(pieces), strict=True):
            found[row] = text
    return found


def words_of_tokens(tokens: Tokens, texts: Sequence[str]) -> list[Word]:
    """The word that each token is in; [] where the tokens say nothing."""
    order = reading_order(tokens)[: len(texts)]
    read = [texts[row] for row in order]
    begins = np.diff(tokens.sequence[order], prepend=-1) != 0
    numbers = word_numbers(read, begins.tolist())
    spelled = joined_words(read, numbers)
    speech = parts_of_speech(spelled) or [""] * len(spelled)
    found: list[Word] = [Word("", "")] * len(texts)
    for row, number in zip(order, numbers, strict=True):
        found[row] = Word(spelled[number], speech[number])
    return found


def reading_order(tokens: Tokens) -> NDArray[np.intp]:
    """Rows of the tokens, sequence by sequence."""
    return np.lexsort((tokens.position, tokens.sequence))


def labels_of(
    recording: Recording, tokens: Tokens, texts: Sequence[str], words: Sequence[Word]
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
        if any(word.speech for word in words):
            found["part of speech"] = np.array([word.speech for word in words]), str
        bin_T, bins = position_bins(tokens.position)
        found["position"] = bin_T, bins.__getitem__
    return found


def what_of(recording: Recording, layers: Sequence[str], kind: str) -> str:
    """What the sequences of these layers are called; an encoder-decoder reads a source and writes another text."""
    if kind == "image":
        return "Picture"
    encodes, decodes = (
        {name for name in recording.layers if part in name.split(".")} for part in ("encoder", "decoder")
    )
    if encodes and decodes:
        return "Source" if {*layers} <= encodes else "Written"
    return "Text"


def sequences_of(recording: Recording, tokens: Tokens, shown: NDArray[np.intp], kind: str, what: str) -> list[Shown]:
    """The sequences among the shown tokens, in their order."""
    sequence_T = tokens.sequence[shown]
    first = np.flatnonzero(np.diff(sequence_T, prepend=-1))
    ends = [*first[1:], len(shown)]
    found = []
    picture_T = pictures_of(tokens)
    for number, (start, end) in enumerate(zip(first, ends, strict=False)):
        row = int(shown[start])
        picture = int(picture_T[row])
        groups = {
            label: recording.names[label][int(value_T[row])]
            for label, value_T in tokens.labels.items()
            if label in recording.names and label not in PLACE_LABELS and int(value_T[row]) in recording.names[label]
        }
        title = f"{what} {(picture if kind == 'image' else number) + 1}" + (
            f" ({', '.join(groups.values())})" if groups else ""
        )
        time = float(tokens.labels["time_step"][row]) if "time_step" in tokens.labels else None
        grids = recording.about.get(GRIDS, [])
        finest = tuple(grids[picture]) if picture < len(grids) else None
        grid, prefix = grid_of(tokens, shown[start:end], finest) if kind == "image" else (None, 0)
        found.append(Shown(title, int(start), int(end - start), picture, time, grid, prefix, groups))
    return found


def grid_of(
    tokens: Tokens, rows: NDArray[np.intp], finest: tuple[int, int] | None = None
) -> tuple[tuple[int, int], int]:
    """Rows and columns of the patches of one picture, and how many tokens stand before them.

    Where tokens do not say where they stand, the map is the finest one of the picture or comes of halving it; a picture
    of which nothing is known is square.
    """
    y_T, x_T = tokens.labels.get("y"), tokens.labels.get("x")
    if y_T is not None and x_T is not None and y_T[rows].min() >= 0:
        return (int(y_T[rows].max()) + 1, int(x_T[rows].max()) + 1), 0
    side = math.isqrt(len(rows))
    grid = (side, side) if finest is None else halved([finest], len(rows))
    return grid, len(rows) - math.prod(grid)
