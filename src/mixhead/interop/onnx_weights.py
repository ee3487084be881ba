"""The weights inside an ONNX file, read without the package `onnx` and without executing anything.

An ONNX file is a protocol buffer: fields of (number, wire type, value), nested. Only the tensors of the graph and the
names of the nodes that take them are looked at: exporters rename weights that they fold, and the node still says whose
they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixhead.errors import MixheadError

# Field numbers of onnx.proto3.
MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER = 1, 5
NODE_INPUT, NODE_NAME = 1, 3
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_RAW = 1, 2, 8, 9
FLOAT32 = 1

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Value = int | memoryview


@dataclass(frozen=True)
class OnnxWeights:
    """What a graph holds.

    Attributes:
        tensors: float32 tensors by their name in the file.
        taken_by: node name -> names of the tensors among its inputs.
    """

    tensors: dict[str, Tensor]
    taken_by: dict[str, tuple[str, ...]]


def read_onnx_weights(path: Path) -> OnnxWeights:
    """Reads all float32 tensors that are stored inside the file.

    Raises:
        MixheadError: where the file is no ONNX file, or is truncated.
    """
    try:
        graphs = [view(value) for number, value in fields(memoryview(path.read_bytes())) if number == MODEL_GRAPH]
        graph = list(fields(graphs[0]))
        tensors = dict(filter(None, (tensor_of(view(value)) for number, value in graph if number == GRAPH_INITIALIZER)))
        nodes = [node_of(view(value)) for number, value in graph if number == GRAPH_NODE]
    except OSError as error:
        raise MixheadError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, IndexError, TypeError) as error:  # what malformed bytes lead to; IndexError: past the end
        raise MixheadError(f"{path} is no ONNX file, or it is truncated ({type(error).__name__}: {error}).") from error
    taken_by = {name: tuple(source for source in inputs if source in tensors) for name, inputs in nodes}
    return OnnxWeights(tensors, taken_by)


def fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """The fields of a message as (number, value); bytes stay views into the file."""
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == VARINT:
            value, at = varint(message, at)
            yield number, value
            continue
        if wire_type == BYTES:
            length, at = varint(message, at)
        elif wire_type in (FIXED32, FIXED64):
            length = 4 if wire_type == FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire_type} at byte {at}")
        if at + length > len(message):
            raise IndexError(f"a field of {length} bytes ends after the file")
        yield number, message[at : at + length]
        at += length


def varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number that begins at a byte, seven bits a byte, and the place after it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {at}")


def view(value: Value) -> memoryview:
    """The value of a field that must hold bytes."""
    if isinstance(value, int):
        raise TypeError("a number stands where bytes are expected")
    return value


def text(value: Value) -> str:
    """The value of a field that must hold text."""
    return bytes(view(value)).decode("utf-8")


def tensor_of(message: memoryview) -> tuple[str, Tensor] | None:
    """Name and values of a tensor; None if it is not float32 or not stored here."""
    dims: list[int] = []
    name, data_type, raw = "", 0, None
    for number, value in fields(message):
        if number == TENSOR_DIMS:
            dims += [value] if isinstance(value, int) else packed(value)
        elif number == TENSOR_TYPE and isinstance(value, int):
            data_type = value
        elif number == TENSOR_NAME:
            name = text(value)
        elif number == TENSOR_RAW:
            raw = view(value)
    if data_type != FLOAT32 or raw is None:
        return None
    if len(raw) != 4 * math.prod(dims):
        raise ValueError(f"{name} has {len(raw)} bytes for the shape {dims}")
    return name, torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(dims) if raw else torch.empty(dims)


def packed(message: memoryview) -> list[int]:
    """Numbers one after the other."""
    numbers, at = [], 0
    while at < len(message):
        number, at = varint(message, at)
        numbers.append(number)
    return numbers


def node_of(message: memoryview) -> tuple[str, list[str]]:
    """Name and inputs of a node."""
    name, inputs = "", []
    for number, value in fields(message):
        if number == NODE_NAME:
            name = text(value)
        elif number == NODE_INPUT:
            inputs.append(text(value))
    return name, inputs
