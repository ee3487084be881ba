"""Text as a model of language expects it: prompts and windows of token ids, with the tokens that begin a text.

Shape legend of this file: W windows, T tokens in one window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mixhead.data.token_text import pieces_of
from mixhead.errors import MixheadError
from mixhead.models.context import check_ids, check_length, check_reads_forward, positions_of

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Windows:
    """Token windows of a text.

    Attributes:
        ids_WT: token ids, int64 [W, T]; each window begins as the tokenizer begins a text.
        given: so many tokens at the beginning of each window are given, the others are to be predicted.
        bytes_W: UTF-8 bytes of the text that is to be predicted in each window, int64 [W].
    """

    ids_WT: Tensor
    given: int
    bytes_W: Tensor


@dataclass(frozen=True)
class Stream:
    """The tokens of several documents, one after the other.

    Attributes:
        ids: their numbers.
        starts: where each begins, in UTF-8 bytes of all documents; one entry more, for the end.
    """

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]


def begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts before a text, begin-of-text as a rule; [] where it puts none."""
    return frame_of(tokenizer)[0]


def frame_of(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and behind a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    if 0 not in special:
        return [], []
    before, behind = special.index(0), special[::-1].index(0)
    return ids[:before], ids[len(ids) - behind :]


def check_text(text: str, what: str = "The text") -> None:
    """Raises where a text holds half a character, which no tokenizer takes and no file can hold."""
    place = next((place for place, sign in enumerate(text) if "\ud800" <= sign <= "\udfff"), None)
    if place is not None:
        raise MixheadError(
            f"{what} holds a lone surrogate (U+{ord(text[place]):04X} at character {place}), which is no character: "
            "it was not read as UTF-8, or cut inside a character."
        )


def prompt_ids(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int | None, default: int
) -> tuple[dict[str, Tensor], int]:
    """A prompt for `generate`, and how many tokens may be written: as many as asked for, else `default` or fewer.

    Args:
        model: that continues it.
        tokenizer: of the model.
        prompt: the text.
        new_tokens: how many shall be written; None takes `default`, or what the model has room for.
        default: see there.

    Returns:
        ({"input_ids", "attention_mask"}, int64 [1, T] each, new tokens).

    Raises:
        MixheadError: where the prompt holds no token, or it and what shall be written exceed what the model computes.
    """
    check_reads_forward(model)
    check_text(prompt, "The prompt")
    plain = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    if not plain:
        raise MixheadError("The prompt holds no token: give one that says something.")
    begin = begin_tokens(tokenizer)
    ids_1T = torch.tensor([plain if plain[: len(begin)] == begin else [*begin, *plain]])
    ids_1T = ids_1T.to(next(model.parameters()).device)
    check_ids(model, ids_1T)
    positions, length = positions_of(model), ids_1T.shape[1]
    # The last token that is written is not read again.
    room = default if positions.count is None else positions.count - length + 1
    if positions.fixed and room < (new_tokens or 1):
        raise MixheadError(
            f"The prompt has {length:,} tokens, and {type(model).__name__} has {positions.count:,} positions: "
            + (f"it can write at most {room:,} new tokens." if room > 0 else "give a shorter one.")
        )
    count = new_tokens or (min(default, room) if room > 0 else default)
    check_length(model, length + count - 1, "The text with what is to be written")
    return {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}, count


def document_windows(tokenizer: PreTrainedTokenizerBase, text: str, window: int) -> Iterator[list[int]]:
    """One document in consecutive windows of token ids, each of which begins as the tokenizer begins a text.

    The last one may be shorter, and none holds tokens of another document.
    """
    check_text(text)
    begin = begin_tokens(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    room = max(window - len(begin), 1)
    for start in range(0, len(ids), room):
        yield [*begin, *ids[start : start + room]]


def token_windows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    window: int,
    limit: int | None = None,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """Cuts texts into consecutive windows of tokens; the rest at the end that fills no window is dropped.

    The texts are joined by the tokenizer's end-of-sequence token, where it has one. Each window begins with what the
    tokenizer puts before a text (`begin_tokens`); no other special tokens are added.

    Args:
        tokenizer: of the model.
        texts: documents.
        window: T, tokens in a window, at least 2.
        limit: at most so many windows, spread evenly over all of the text (a prefix would show a single era); None
            takes all of them.
        on_progress: called with (documents done, all documents) while tokenizing.

    Returns:
        ids_WT, int64 [W, T] with W >= 1, in the order of the text.

    Raises:
        MixheadError: where the text is shorter than one window or a number is too small.
    """
    return text_windows(tokenizer, texts, window, limit, on_progress).ids_WT


def text_windows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    window: int,
    limit: int | None = None,
    on_progress: OnProgress | None = None,
) -> Windows:
    """The same windows, with how much text each holds: what perplexities of other tokenizers are compared by."""
    begin = begin_tokens(tokenizer)
    room = window - len(begin)
    if window < 2 or room < 1:
        raise MixheadError(
            f"window must be at least {max(2, len(begin) + 1)} tokens, one to read and one to predict, but it is "
            f"{window}."
        )
    if limit is not None and limit < 1:
        raise MixheadError(f"limit must be at least 1 window, or None for all of them, but it is {limit}.")
    stream = token_stream(tokenizer, texts, on_progress)
    count = len(stream.ids) // room
    if count == 0:
        raise MixheadError(
            f"The text has {len(stream.ids) + len(begin):,} tokens, fewer than one window of {window:,}; "
            f"give a longer text or a smaller window."
        )
    chosen_W = np.arange(count) if limit is None or limit >= count else np.arange(limit) * count // limit
    first_W = chosen_W * room
    text_WT = torch.from_numpy(stream.ids[first_W[:, None] + np.arange(room)])
    ids_WT = torch.cat([torch.tensor(begin, dtype=torch.int64).expand(len(chosen_W), -1), text_WT], dim=1)
    given = max(len(begin), 1)
    predicted_W = first_W + (given - len(begin))
    return Windows(ids_WT, given, torch.from_numpy(stream.starts[first_W + room] - stream.starts[predicted_W]))


def token_stream(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], on_progress: OnProgress | None = None
) -> Stream:
    """All tokens one after the other, with the tokenizer's end-of-sequence token between documents."""
    separator = [] if tokenizer.eos_token_id is None else [cast(int, tokenizer.eos_token_id)]
    ids: list[list[int]] = []
    starts: list[NDArray[np.int64]] = []
    done_bytes = 0
    for done, text in enumerate(texts, start=1):
        check_text(text)
        bytes_at = bytes_before(text)
        found, begins = tokens_of(tokenizer, text, bytes_at)
        if done > 1:
            ids.append(separator)
            starts.append(np.full(len(separator), done_bytes))
        ids.append(found)
        starts.append(done_bytes + begins)
        done_bytes += int(bytes_at[-1])
        if on_progress is not None:
            on_progress(done, len(texts))
    joined = np.fromiter((token for part in ids for token in part), dtype=np.int64)
    return Stream(joined, np.concatenate([*starts, [done_bytes]]).astype(np.int64))


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, text: str, bytes_at: NDArray[np.int64]
) -> tuple[list[int], NDArray[np.int64]]:
    """The tokens of a text, and at which of its bytes each begins."""
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=tokenizer.is_fast)
    ids: list[int] = encoded["input_ids"]
    if tokenizer.is_fast:
        return ids, bytes_at[np.array([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)]
    pieces = pieces_of(tokenizer, ids)
    ends = np.cumsum([0, *(len(pieces[token].encode("utf-8", "surrogateescape")) for token in ids)])
    return ids, np.minimum(ends[: len(ids)], bytes_at[-1])


def bytes_before(text: str) -> NDArray[np.int64]:
    """How many UTF-8 bytes stand before each character, and at the end, int64 [characters + 1]."""
    code = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (code >= 0x80).astype(np.int64) + (code >= 0x800) + (code >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])
