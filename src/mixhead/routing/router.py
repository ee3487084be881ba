"""`Router`: what every router is, so that whoever wants to see a routing knows where to look."""

from __future__ import annotations

from torch import nn


class Router(nn.Module):
    """A module whose call returns a `Routing`: `router(hidden_BNC, q_BHND, token_mask_BN)`.

    Each attention layer keeps its router as a submodule and calls it. That is all that `mixhead.record_routing` needs:
    it listens to the routers of a model, under the names of the modules that hold them.

    Attributes:
        needs_query: whether the queries must exist before the routing does. Where it is False, the query projection of
            heads that are not selected need not be computed.
    """

    needs_query = False

    def reset_parameters(self) -> None:
        """Gives all parameters and buffers their start values: here, those that the parts have by themselves."""
        for part in self.children():
            part.reset_parameters()  # type: ignore[operator]
