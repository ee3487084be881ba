"""Text that a model writes, token by token, each with the heads that it used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from mixhead.data.token_text import pieces_of, readable
from mixhead.data.windows import prompt_ids
from mixhead.recording import ExactLog, keep_routing


@dataclass
class Written:
    """What was written so far.

    Attributes:
        texts: what each token says, the prompt's first.
        prompt: how many of them are the prompt.
        heads: by layer, the heads that each token used; the newest token has used none yet.
    """

    texts: list[str] = field(default_factory=list)
    prompt: int = 0
    heads: dict[str, list[list[int]]] = field(default_factory=dict)


class _Queue(BaseStreamer):
    """Hands on what `generate` chooses."""

    def __init__(self) -> None:
        self.items: queue.Queue[list[int] | BaseException | None] = queue.Queue()

    def put(self, value: Tensor) -> None:
        self.items.put(value.flatten().tolist())

    def end(self) -> None:
        """The caller's thread says when all is done, errors too."""


def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int
) -> Iterator[Written]:
    """Continues a prompt, always with the likeliest token, and yields after each.

    The iterator must not be left before its end without being closed: it then stops the model.

    Raises:
        MixheadError: where the prompt holds no token, or more than the model has positions.
    """
    inputs, new_tokens = prompt_ids(model, tokenizer, prompt, None, new_tokens)
    written = Written(prompt=inputs["input_ids"].shape[1])
    streamer, stop, pieces = _Queue(), threading.Event(), list[str]()

    def stopped(input_ids: Tensor, scores: Any, **_kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), stop.is_set(), dtype=torch.bool)

    def write() -> None:
        try:
            with torch.inference_mode():
                model.generate(
                    **inputs, max_new_tokens=new_tokens, do_sample=False, streamer=streamer, stopping_criteria=[stopped]
                )
            streamer.items.put(None)
        except BaseException as error:  # whatever it is, the caller's thread shall raise it
            streamer.items.put(error)

    with keep_routing(model) as log:
        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        try:
            while (ids := streamer.items.get()) is not None:
                if isinstance(ids, BaseException):
                    raise ids
                pieces += [pieces_of(tokenizer, [token])[token] for token in ids]
                written.texts = readable(pieces)
                written.heads = heads_of(log, len(pieces))
                yield written
        finally:
            stop.set()
            thread.join()


def heads_of(log: ExactLog, most: int) -> dict[str, list[list[int]]]:
    """By layer, the heads that each of the first tokens used."""
    found: dict[str, list[list[int]]] = {}
    for layer, routing in list(log.layers):
        used = found.setdefault(layer, [])
        used += [row.nonzero()[:, 0].tolist() for row in routing.selected_BNH[0]]
    return {layer: used[:most] for layer, used in found.items()}
