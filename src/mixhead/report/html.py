"""The report as one HTML file that needs no network: markup, style and script of the folder `page`, and the data.

The data is JSON in an element that no browser runs; all that could end that element is escaped, and the script shows
texts as text. A content security policy forbids the file to load anything.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixhead.files import writing
from mixhead.recording.names import short_names
from mixhead.report.contents import Axis, Contents, Group
from mixhead.report.statistics import (
    BLOCK,
    LEAST_BLOCKS,
    Load,
    coefficient_of_variation,
    in_words,
    load_of,
    relative_entropy,
)

MOST_GATES = 3_000_000  # bytes of gates that a page carries; beyond, it shows which heads are used and no weights
MOST_PARTS = 60  # sequences that can be compared
EXAMPLES = {"text": 1, "image": 4}  # sequences of a group that stand side by side with those of another


def write_html(
    contents: Contents, file: str | Path, *, title: str = "Which heads are used", pictures: Sequence[bytes] = ()
) -> Path:
    """Writes the report as one file.

    Args:
        contents: what it shows.
        file: the file to write.
        title: heading of the page.
        pictures: for models of images: PNG or JPEG files, in the order in which the model saw them.
    """
    file = Path(file)
    with writing(file) as partial:
        partial.write_text(page(contents, title, pictures), encoding="utf-8")
    return file


def page(contents: Contents, title: str, pictures: Sequence[bytes] = ()) -> str:
    """The text of the HTML file."""
    folder = files("mixhead.report") / "page"
    script = "\n".join(
        part.read_text("utf-8")
        for part in sorted(folder.iterdir(), key=lambda part: part.name)
        if part.name.endswith(".js")
    )
    parts = {
        "title": html.escape(title),
        "style": (folder / "page.css").read_text("utf-8"),
        "script": script,
        "data": escaped_json(data_of(contents, pictures)),
    }
    # One pass over the template, so that nothing in a part is taken for a place to fill.
    pieces = (folder / "page.html").read_text("utf-8").split("{{")
    return pieces[0] + "".join(parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces[1:]))


def escaped_json(data: Any) -> str:
    """JSON that may stand in a script element: no text in it can end the element or open a comment."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def data_of(contents: Contents, pictures: Sequence[bytes] = ()) -> dict[str, Any]:
    """What the script of the page reads."""
    names = contents.recording.layers
    number = {name: i for i, name in enumerate(names)}
    short = dict(zip(names, short_names(names), strict=True))
    layers: list[Any] = [None] * len(names)
    for a, axis in enumerate(contents.axes):
        column = 0
        for name in axis.layers:
            layers[number[name]] = layer_data(contents, name, short[name], a, column)
            column += layers[number[name]]["heads"]
    times = sorted({s.time for axis in contents.axes for s in axis.sequences if s.time is not None}, reverse=True)
    return {
        "subtitle": subtitle(contents),
        "footer": footer(contents),
        "findings": [*in_words({short_title(short[n]): contents.loads[n] for n in names}, shared_of(contents, short))],
        "start": names.index(most_telling(contents)),
        "observations": " and ".join(dict.fromkeys(axis.observations for axis in contents.axes)),
        "least": LEAST_BLOCKS,
        "layers": layers,
        "axes": [axis_data(axis, contents, number) for axis in contents.axes],
        "times": times,
        "groups": [
            {"label": group.label, "value": group.value, **bands_data(group.loads, number)} for group in contents.groups
        ],
        "parts": parts_data(contents, number),
        "words": [
            [[[word, round(bits, 3)] for word, bits in words] for words in contents.words.get(name, [])]
            for name in names
        ]
        if contents.words
        else [],
        "together": [[hundredths(row) for row in contents.together[name]] for name in names],
        "agreement": agreement_data(contents, number),
        "pictures": [data_address(picture) for picture in pictures],
    }


def most_telling(contents: Contents) -> str:
    """The layer whose heads tell most about a token: they are used neither always nor never."""
    spread = {name: float((load.share_H * (1 - load.share_H)).sum()) for name, load in contents.loads.items()}
    return max(contents.recording.layers, key=spread.__getitem__)


def layer_data(contents: Contents, name: str, short: str, axis: int, column: int) -> dict[str, Any]:
    """One layer: its name, its loads, and where its bits stand."""
    load = contents.loads[name]
    competing = competing_heads(contents, name)
    return {
        "name": name,
        "short": short,
        "heads": len(load.share_H),
        "shared": [head for head in range(len(load.share_H)) if head not in competing],
        "load": rounded(load.share_H),
        "band": [rounded(band) for band in load.band_H2],
        "entropy": round(relative_entropy(load.share_H[competing]), 3),
        "cv": round(coefficient_of_variation(load.share_H[competing]), 3),
        "axis": axis,
        "at": column,
    }


def competing_heads(contents: Contents, name: str) -> list[int]:
    """The heads that are not shared by all tokens."""
    shared = contents.recording.shared.get(name, [])
    return [head for head in range(len(contents.loads[name].share_H)) if head not in shared]


def shared_of(contents: Contents, short: Mapping[str, str]) -> dict[str, Sequence[int]]:
    """Shared heads by the short title of the layer."""
    return {short_title(short[name]): heads for name, heads in contents.recording.shared.items()}


def short_title(short: str) -> str:
    """`layer 3`."""
    return f"layer {short}"


def axis_data(axis: Axis, contents: Contents, number: Mapping[str, int]) -> dict[str, Any]:
    """The shown tokens, a bit for each head."""
    bits_TX = np.packbits(axis.codes_TX > 0, axis=1)
    weighted = contents.gates_vary and axis.codes_TX.size <= MOST_GATES
    return {
        "kind": axis.kind,
        "layers": [number[name] for name in axis.layers],
        "width": axis.codes_TX.shape[1],
        "stride": bits_TX.shape[1],
        "bits": packed(bits_TX),
        "gates": packed(axis.codes_TX) if weighted else None,
        "texts": axis.texts,
        "sequences": [
            {
                "title": s.title,
                "first": s.first,
                "count": s.count,
                "picture": s.picture,
                "time": s.time,
                "grid": s.grid,
                "prefix": s.prefix,
            }
            for s in axis.sequences
        ],
    }


def parts_data(contents: Contents, number: Mapping[str, int]) -> list[dict[str, Any]]:
    """What can be compared with each other: all tokens, groups, single texts."""
    parts = [{"kind": "All", "name": "All tokens", "sequences": [], **loads_data(contents.loads, number)}]
    for group in contents.groups:
        examples = examples_of(contents, group)
        loads = loads_data(group.loads, number)
        parts.append({"kind": f"By {group.label}", "name": group.value, "sequences": examples, **loads})
    sequences = [(a, s) for a, axis in enumerate(contents.axes) for s in range(len(axis.sequences))]
    for a, s in sequences[:MOST_PARTS]:
        axis = contents.axes[a]
        sequence = axis.sequences[s]
        name = sequence.title if sequence.time is None else f"{sequence.title}, time step {sequence.time:g}"
        loads = loads_data(sequence_loads(contents, axis, sequence.first, sequence.count), number)
        parts.append({"kind": "One by one", "name": name, "sequences": [[a, s]], **loads})
    return parts


def examples_of(contents: Contents, group: Group) -> list[list[int]]:
    """The first sequences of a group, as numbers of axis and sequence; a picture counts once."""
    found: dict[int | tuple[int, int], list[int]] = {}
    for a, axis in enumerate(contents.axes):
        for s, sequence in enumerate(axis.sequences):
            if sequence.groups.get(group.label) == group.value:
                found.setdefault(sequence.picture if axis.kind == "image" else (a, s), [a, s])
    return list(found.values())[: EXAMPLES[contents.axes[0].kind]]


def sequence_loads(contents: Contents, axis: Axis, first: int, count: int) -> dict[str, Load]:
    """Loads of the layers of an axis among the tokens of one sequence."""
    block_N = np.arange(count) // (BLOCK if axis.kind == "text" else count)
    loads, column = {}, 0
    for name in axis.layers:
        heads = len(contents.loads[name].share_H)
        loads[name] = load_of(axis.codes_TX[first : first + count, column : column + heads] > 0, block_N)
        column += heads
    return loads


def loads_data(loads: Mapping[str, Load], number: Mapping[str, int]) -> dict[str, Any]:
    """What a test needs, a list for each layer; null for layers that did not see these tokens."""
    load_by_layer: list[Load | None] = [None] * len(number)
    for name, load in loads.items():
        load_by_layer[number[name]] = load
    return {
        "load": [load and rounded(load.share_H, 6) for load in load_by_layer],
        "error": [load and rounded(load.error_H, 6) for load in load_by_layer],
        "seen": [load and [load.tokens, load.blocks, load.pairs] for load in load_by_layer],
    }


def bands_data(loads: Mapping[str, Load], number: Mapping[str, int]) -> dict[str, Any]:
    """Loads and their bands, a list for each layer; null for layers that did not see these tokens."""
    share: list[Any] = [None] * len(number)
    band: list[Any] = [None] * len(number)
    for name, load in loads.items():
        share[number[name]], band[number[name]] = rounded(load.share_H), [rounded(of) for of in load.band_H2]
    most = max(loads.values(), key=lambda load: load.tokens)
    return {"tokens": most.tokens, "blocks": most.blocks, "load": share, "band": band}


def agreement_data(contents: Contents, number: Mapping[str, int]) -> list[list[int | None]]:
    """How alike each two layers sort the tokens, in hundredths; null where they saw different ones."""
    table: list[list[int | None]] = [[None] * len(number) for _ in number]
    for (one, other), value in contents.agreement.items():
        for a, b in ((one, other), (other, one)):
            table[number[a]][number[b]] = round(100 * value)
    return table


def hundredths(values: NDArray[Any]) -> list[int]:
    """Whole numbers of hundredths."""
    return [round(100 * float(value)) for value in values]


def rounded(values: NDArray[Any], digits: int = 4) -> list[float | None]:
    """So many digits behind the point; what is no number becomes null."""
    return [None if math.isnan(value) else round(float(value), digits) for value in values]


def packed(values: NDArray[np.uint8]) -> str:
    """Bytes as text."""
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def data_address(picture: bytes) -> str:
    """A picture as an address that holds it."""
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"


def subtitle(contents: Contents) -> str:
    """How much was seen."""
    recording = contents.recording
    heads = sum(len(load.share_H) for load in contents.loads.values())
    active = sum(float(load.share_H.sum()) for load in contents.loads.values())
    tokens = max(load.tokens for load in contents.loads.values())
    name = f"{recording.about['model']}: " if "model" in recording.about else ""
    # A token of a source meets the encoder only: no token meets all heads of a model with several axes.
    share = f"{active / heads:.1%}"
    used = f"{active:,.1f} of them ({share})" if len(contents.axes) == 1 else f"{share} of those that it meets"
    used += of_all_heads(active, heads, recording.about)
    counts = [f"{contents.loads[axis.layers[0]].blocks:,} {axis.observations}" for axis in contents.axes]
    seen = f"{tokens:,} tokens ({', '.join(dict.fromkeys(counts))})"
    return f"{name}{seen}, {len(recording.layers)} layers that route, {heads:,} heads; a token uses {used}."


def of_all_heads(active: float, heads: int, about: Mapping[str, Any]) -> str:
    """The share of all heads, as `convert` and `generate` state it; "" where no layer is dense."""
    dense = about.get("dense_heads", 0)
    if not isinstance(dense, int) or dense <= 0:
        return ""
    return f", and with the {dense:,} heads of layers that do not route {(active + dense) / (heads + dense):.1%} of all"


def footer(contents: Contents) -> str:
    """Where it comes from, and what was left out."""
    command = contents.recording.about.get("command")
    return " ".join([*contents.notes, *([f"Made by {command}."] if command else ["Made by mixhead inspect."])])
