"""Files of records (JSON, JSON lines, tables), each with a document in one of its fields."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixhead.errors import MixheadError, first_line, listed

FIELD = "text"
JSON_LINES = (".jsonl", ".ndjson")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
RECORDS = frozenset((*JSON_LINES, ".json", *SEPARATORS))


def documents_of(path: Path, content: str, field: str = FIELD) -> list[str]:
    """The documents of a file of records, in their order; empty ones are left out.

    Args:
        path: of the file; its suffix says how records are written.
        content: what the file holds.
        field: the field of each record that is its document. A record that is a string is a document itself.

    Raises:
        MixheadError: where the file is damaged, or a record has no such field.
    """
    documents = [text for place, record in _records(path, content) if (text := _document(record, field, path, place))]
    if not documents:
        raise MixheadError(f"No record of {path} says anything in the field {field!r}.")
    return documents


def _records(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    """Each record, and where it stands."""
    suffix = path.suffix.lower()
    if suffix in SEPARATORS:
        yield from ((f"Row {row}", record) for row, record in enumerate(_rows(content, path, SEPARATORS[suffix]), 1))
    elif suffix in JSON_LINES:
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                yield f"Line {number}", _parsed(line, path, f"Line {number}")
    else:
        whole = _parsed(content, path, "The content")
        yield from (
            (f"Entry {entry}", record) for entry, record in enumerate(whole if isinstance(whole, list) else [whole], 1)
        )


def _rows(content: str, path: Path, separator: str) -> list[dict[str, str]]:
    """The rows of a table, whose fields may be long: they are documents."""
    shorter = csv.field_size_limit(sys.maxsize)
    try:
        return list(csv.DictReader(io.StringIO(content, newline=""), delimiter=separator))
    except csv.Error as error:
        raise MixheadError(f"{path} is no table of values between {separator!r} ({error}).") from None
    finally:
        csv.field_size_limit(shorter)


def _parsed(text: str, path: Path, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MixheadError(f"{place} of {path} is no JSON ({first_line(error)}).") from None


def _document(record: Any, field: str, path: Path, place: str) -> str:
    """What a record says; "" where it says nothing."""
    if isinstance(record, str):
        return record if record.strip() else ""
    text = record.get(field) if isinstance(record, dict) else None
    if isinstance(text, str):
        return text if text.strip() else ""
    if isinstance(record, dict) and field in record and text is None:
        return ""
    fields = listed([str(name) for name in record]) if isinstance(record, dict) else "none"
    raise MixheadError(
        f"{place} of {path} has no text in a field {field!r} (its fields: {fields}): name the field that holds it, as "
        f"{path}:FIELD, or give plain text in a file with another ending."
    )
