"""Models from the official code's configurations and weights: `from_official(kind, config, state_dict)`.

Configurations use the official argument names, state dicts the official parameter names. A kind is one adapter
function; each fills a module of this library and refuses weights that are missing, left over or of another shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from mixhead.errors import MixheadError
from mixhead.interop.dit import moh_dit, moh_dit_attention
from mixhead.interop.llama import moh_llama
from mixhead.interop.moa import moa_attention
from mixhead.interop.vit import moh_vit

StateDict = Mapping[str, Tensor]


def from_official(kind: str, config: Mapping[str, Any], state_dict: StateDict) -> nn.Module:
    """A module of this library with the weights of the official code.

    Args:
        kind: one of `KINDS`.
        config: sizes under the official argument names.
        state_dict: weights under the official parameter names.

    Raises:
        MixheadError: where the kind is unknown, or configuration and weights do not fit each other.
    """
    if kind not in KINDS:
        raise MixheadError(f"kind={kind!r} is unknown: choose one of {', '.join(sorted(KINDS))}.")
    try:
        return KINDS[kind](config, state_dict)
    except KeyError as missing:
        raise MixheadError(f"The configuration of {kind} lacks {missing}: give every size that it names.") from missing


KINDS: dict[str, Callable[[Mapping[str, Any], StateDict], nn.Module]] = {
    "moa_attention": moa_attention,
    "moh_dit": moh_dit,
    "moh_dit_attention": moh_dit_attention,
    "moh_llama": moh_llama,
    "moh_vit": moh_vit,
}
