"""Tokens as text that a reader recognises, also where one character is spread over several tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> dict[int, str]:
    """The text that each token stands for. Bytes that are no character of their own become lone surrogates.

    Args:
        tokenizer: of the model.
        ids: numbers of tokens; each needs to be given once only.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = f"{getattr(backend, 'decoder', None)!r} {getattr(backend, 'pre_tokenizer', None)!r}"
    return {token: _piece(tokenizer, token, kind) for token in dict.fromkeys(map(int, ids))}


def _piece(tokenizer: PreTrainedTokenizerBase, token: int, kind: str) -> str:
    raw = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None
    if raw is None:
        return f"<{token}>"
    if token in tokenizer.all_special_ids:
        return str(raw)
    if "ByteLevel" in kind:
        values = {character: value for value, character in bytes_to_unicode().items()}
        if all(character in values for character in raw):
            return bytes(values[character] for character in raw).decode("utf-8", "surrogateescape")
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", raw):
        return bytes([int(byte[1], 16)]).decode("utf-8", "surrogateescape")
    if "WordPiece" in kind:
        return raw[2:] if raw.startswith("##") else f" {raw}"
    return str(raw).replace("▁", " ")


def readable(pieces: Sequence[str]) -> list[str]:
    """The pieces of one sequence with every character whole: it stands at its first token, its others are empty."""
    texts: list[str] = []
    held: list[str] = []
    for piece in pieces:
        held.append(piece)
        if _is_whole(held) or len(held) == 4:  # no character has more than 4 bytes
            texts += [_joined(held), *[""] * (len(held) - 1)]
            held = []
    return texts + ([_joined(held), *[""] * (len(held) - 1)] if held else [])


def _is_whole(pieces: Sequence[str]) -> bool:
    try:
        "".join(pieces).encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return False
    return True


def _joined(pieces: Sequence[str]) -> str:
    return "".join(pieces).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
