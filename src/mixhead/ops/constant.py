"""What torch.compile may take for a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_when_compiled(function: F) -> F:
    """Lets torch.compile call the function once, while it traces, and keep the result.

    The mark is that of `torch.compiler.assume_constant_result`, which imports torch._dynamo for it: seconds that a
    program without torch.compile need not wait.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
