"""Filling a module with renamed weights: every one must be there, none left over, all of the right shape."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mixhead.errors import MixheadError


def load_exactly(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copies weights into a module, which takes on their dtype."""
    check_fit(module, state_dict)
    dtypes = {tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        module.to(dtypes.pop())
    module.load_state_dict(dict(state_dict))


def check_fit(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Raises where weights are missing, left over or of another shape."""
    expected = module.state_dict()
    missing = sorted(expected.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - expected.keys())
    if missing or unexpected:
        raise MixheadError(
            f"The weights do not fit the configuration: missing {missing or 'none'}, unexpected {unexpected or 'none'}."
        )
    for name, tensor in state_dict.items():
        if tensor.shape != expected[name].shape:
            raise MixheadError(
                f"The weight {name} must be {list(expected[name].shape)}, but it is {list(tensor.shape)}."
            )
