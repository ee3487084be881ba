"""What one call of a converted model wants of all its layers: they ask, since not every architecture hands it down.

It holds for the thread (and the task of asyncio) that runs the call, and only while it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.utils.output_capturing import CompileableContextVar

from mixhead.models.hugging_face.trace import RoutingTrace


class StandIn(Protocol):
    """Looks at the attention of a call, and may compute it instead: so calibration and inspection look."""

    def __call__(
        self,
        module: nn.Module,
        q_BHND: Tensor,
        k_BKTD: Tensor,
        v_BKTD: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None,
        is_causal: bool | None,
        hidden_BNC: Tensor,
        token_mask_BN: Tensor | None,
    ) -> tuple[Tensor, Tensor | None] | None:
        """As `moh_attention_forward`, or None to let it compute; False in the token mask is padding."""
        ...


@dataclass(frozen=True)
class Call:
    """What a call wants.

    Attributes:
        trace: collects the routings.
        decoder_token_mask_BN: bool, False at padding of the decoder, whose cross-attention has no mask to tell it.
        impl: the engine, see `mixhead.ops.head_attention`.
        stand_in: looks at the attention, or computes it.
    """

    trace: RoutingTrace | None = None
    decoder_token_mask_BN: Tensor | None = None
    impl: str = "auto"
    stand_in: StandIn | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nobody looks, and any engine will do."""
        return self.trace is None and self.stand_in is None and self.impl == "auto"


ORDINARY = Call()
_running = CompileableContextVar("mixhead_call")


def running_call() -> Call:
    """The call that runs now; where none was begun (a part of a model is called alone), an ordinary one."""
    return _running.get() or ORDINARY


@contextmanager
def running(call: Call) -> Iterator[None]:
    """The call runs inside."""
    token = _running.set(call)
    try:
        yield
    finally:
        _running.reset(token)


def carrying_calls(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A function of gradient checkpointing whose layers run again, in the backward pass, under the first call."""
    if getattr(checkpoint, "func", None) is checkpoint_under_call:
        return checkpoint
    function, keywords = getattr(checkpoint, "func", checkpoint), getattr(checkpoint, "keywords", {})
    return functools.partial(checkpoint_under_call, function, **keywords)


def checkpoint_under_call(checkpoint: Callable[..., Any], layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Checkpoints a layer; what it records was recorded the first time."""
    return checkpoint(functools.partial(run_under, replace(running_call(), trace=None), layer), *args, **kwargs)


def run_under(call: Call, layer: Callable[..., Any], *args: Any) -> Any:
    """Runs a layer: under the call that runs, or in the backward pass under the one that is given."""
    if _running.get() is not None:
        return layer(*args)
    with running(call):
        return layer(*args)
