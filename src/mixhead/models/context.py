"""What a language model can be given: how many tokens at once, which numbers of tokens, and which way it reads.

Shape legend: B texts, N tokens.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixhead.errors import MixheadError

logger = logging.getLogger(__name__)

DECLARED = ("max_position_embeddings", "max_seq_len", "n_positions")  # what configurations call the number of positions
BIASED = "max_seq_len"  # MPT makes its position bias for so many keys, once
COMPARED = 8  # tokens that tell whether a model looks ahead
SEEN_AHEAD = {torch.float32: 1e-3, torch.float64: 1e-3}  # how far earlier outputs move then, at least
SEEN_AHEAD_ROUNDED = 3e-2  # where half precision rounds


@dataclass(frozen=True)
class Positions:
    """How many tokens a model takes at once.

    Attributes:
        count: as its configuration and its tables say; None where nothing does.
        fixed: whether it cannot compute more: it has a table with one entry a position. Others merely were not trained
            on more.
    """

    count: int | None
    fixed: bool


def positions_of(model: nn.Module) -> Positions:
    """The positions of a model of text; its weights are not looked at, so it may lie on the device "meta"."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    name, declared = next(
        ((name, value) for name in DECLARED if isinstance(value := getattr(text, name, None), int) and value > 0),
        ("", None),
    )
    if declared is None:
        return Positions(None, False)
    tables = [room for path, module in model.named_modules() if (room := room_of(path, module, declared)) is not None]
    tables += [declared for path, buffer in model.named_buffers() if is_table(path) and buffer.shape[:1] == (declared,)]
    return Positions(min([declared, *tables]), bool(tables) or name == BIASED)


def is_table(path: str) -> bool:
    """Whether a name is one that transformers gives tables of positions."""
    last = path.rpartition(".")[2]
    return "pos" in last or last == "wpe"


def room_of(path: str, module: nn.Module, declared: int) -> int | None:
    """For how many tokens a table of the declared size has entries; None where the module is no such table.

    OPT, BART and their kin add rows before the first position; RoBERTa and its kin count from behind the padding.
    """
    if not isinstance(module, nn.Embedding) or not is_table(path):
        return None
    room = module.num_embeddings - int(getattr(module, "offset", 0) or 0)
    padding = module.padding_idx
    return None if room != declared else room if padding is None else room - padding - 1


def window_for(models: list[nn.Module], asked: int | None, default: int) -> int:
    """Tokens of a window that all of these models take: as many as asked for, else `default` or what there is room for.

    Raises:
        MixheadError: where more is asked for than one of them can compute.
    """
    if asked is not None:
        for model in models:
            check_room(model, asked, "The window")
        return asked
    counts = (positions_of(model).count for model in models)
    return min([default, *(count for count in counts if count is not None)])


def check_length(model: nn.Module, tokens: int, what: str = "The text") -> None:
    """Raises where a model cannot compute so many tokens at once; warns where it was never trained on so many."""
    positions = check_room(model, tokens, what)
    if positions.count is not None and tokens > positions.count:
        logger.warning(
            "%s has %s tokens, more than the %s positions that %s was made for: what it says beyond them means little.",
            what,
            f"{tokens:,}",
            f"{positions.count:,}",
            type(model).__name__,
        )


def check_room(model: nn.Module, tokens: int, what: str = "The text") -> Positions:
    """The positions of a model; raises where it cannot compute so many tokens at once."""
    positions = positions_of(model)
    if positions.fixed and positions.count is not None and tokens > positions.count:
        raise MixheadError(
            f"{what} has {tokens:,} tokens, but {type(model).__name__} has {positions.count:,} positions: give at most "
            "so many."
        )
    return positions


def check_ids(model: nn.Module, ids: Tensor) -> None:
    """Raises where token ids are not numbers of tokens that the model knows, or where there is none."""
    if ids.numel() == 0:
        raise MixheadError("There is no token to read: give a text that says something.")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise MixheadError(f"Token ids must be integers, but these are {ids.dtype}: cut the text with a tokenizer.")
    known = vocabulary_of(model)
    low, high = int(ids.min()), int(ids.max())
    if known is not None and (low < 0 or high >= known):
        raise MixheadError(
            f"The text holds the token {low if low < 0 else high}, but {type(model).__name__} knows 0 to {known - 1}: "
            "cut the text with the model's own tokenizer."
        )


def vocabulary_of(model: nn.Module) -> int | None:
    """How many tokens have an embedding; None where the model says nothing of it."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def check_reads_forward(model: nn.Module) -> None:
    """Raises where a model is built as an encoder, which sees the words that it would have to predict."""
    flags = {module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)}
    if flags == {False} and getattr(getattr(model, "config", None), "is_decoder", None) is False:
        refuse_looking_ahead(model)


@torch.no_grad()
def check_predicts(model: nn.Module, ids_N: Tensor) -> None:
    """Raises where what a model says of a token depends on later ones: two short runs that differ in those tell.

    Args:
        model: maps `input_ids` [B, N] to an output with `.logits`, in evaluation mode.
        ids_N: some text.
    """
    check_reads_forward(model)
    ids_1N = ids_N[None, :COMPARED]
    half = ids_1N.shape[1] // 2
    changed_1N = ids_1N.clone()
    changed_1N[:, half:] = ids_1N[:, :1]
    if half == 0 or torch.equal(changed_1N, ids_1N):
        return
    one, other = (model(input_ids=ids, use_cache=False).logits[:, :half].float() for ids in (ids_1N, changed_1N))
    moved = (one - other).norm() / (one - one.mean()).norm().clamp_min(1e-12)
    dtype = next(model.parameters()).dtype
    if moved > SEEN_AHEAD.get(dtype, SEEN_AHEAD_ROUNDED):  # NaN is no answer to this question
        refuse_looking_ahead(model)


def refuse_looking_ahead(model: nn.Module) -> None:
    """Raises: no perplexity, no next word."""
    raise MixheadError(
        f"{type(model).__name__} sees the words that it would have to predict (it is an encoder, or was loaded as "
        "one), so it has no perplexity of next words and writes no text. If it was trained to write, its configuration "
        "must say is_decoder=True."
    )
