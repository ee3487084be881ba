"""`aggregated_attention`: checks its arguments and picks an implementation.

Shape legend of this folder: B batch, N = Y * X queries and keys of a map, T pooled keys, H heads, D head dim,
L = window ** 2 positions of the local window in rows from its upper left corner.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixhead.ops.aggregated.arguments import AggregatedArguments, RelativeBias
from mixhead.ops.aggregated.engines import AGGREGATED_IMPLEMENTATIONS
from mixhead.ops.choice import Choice
from mixhead.ops.crossover.rulings import What, ruling, share_of
from mixhead.ops.engine import asked_for
from mixhead.routing import Routing


def aggregated_attention(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    routing: Routing | None,
    *,
    size: tuple[int, int],
    query_embedding_HD: Tensor,
    temperature_H: Tensor,
    local_bias_HL: Tensor,
    pool_bias: RelativeBias,
    learnable_tokens_HDL: Tensor,
    learnable_bias_HL: Tensor,
    impl: str = "auto",
) -> Tensor:
    """Aggregated attention of the selected heads, times their gates (TransNeXt, arXiv 2311.17132; MoH eq. 4).

    With unit vectors u(x) = x / |x|, the query of a token at row y and column x,

        s = (u(q) + query embedding) * temperature * log(number of keys that the token sees)

    has the scores s . u(k) + local bias for the L keys of the window around (y, x), those outside of the map left out,
    and s . u(k) + pool bias for all T pooled keys. One softmax over both gives the weights. To those of the window,
    u(q) . learnable tokens + learnable bias is added after the softmax.

    Args:
        q_BHND: queries of a map, row by row, not normalised.
        k_BHND: keys of the same map, not normalised.
        v_BHND: values of the same map.
        k_BHTD: pooled keys, not normalised.
        v_BHTD: pooled values.
        routing: gates and selected heads, [B, N, H]; None for all heads with the gate 1.
        size: rows Y and columns X of the map.
        query_embedding_HD: added to unit queries.
        temperature_H: positive.
        local_bias_HL: added to the scores of the window.
        pool_bias: added to the scores of the pooled keys.
        learnable_tokens_HDL: see above.
        learnable_bias_HL: see above.
        impl: "auto" or one of `AGGREGATED_IMPLEMENTATIONS`.

    Returns:
        [B, H, N, D] in the dtype of the values: zero where a head is not selected.

    Raises:
        MixheadError: where shapes or the name of the engine do not fit, or the engine that was asked for refuses.
    """
    gates_BNH, selected_BNH = (None, None) if routing is None else (routing.gates_BNH, routing.selected_BNH)
    arguments = AggregatedArguments(
        q_BHND, k_BHND, v_BHND, k_BHTD, v_BHTD, gates_BNH, selected_BNH, size, query_embedding_HD, temperature_H,
        local_bias_HL, pool_bias, learnable_tokens_HDL, learnable_bias_HL,
    )  # fmt: skip
    arguments.check()
    if impl == "auto":
        engine = AGGREGATED_IMPLEMENTATIONS[explain_aggregated(q_BHND, k_BHTD, arguments.window, routing).impl]
    else:
        engine = asked_for(impl, AGGREGATED_IMPLEMENTATIONS, q_BHND, k_BHTD, arguments.window)
    return engine.run(arguments)


def explain_aggregated(q_BHND: Tensor, k_BHTD: Tensor, window: int, routing: Routing | None = None) -> Choice:
    """Which implementation `impl="auto"` takes for these queries and pooled keys, and why.

    Args:
        q_BHND: queries of a map.
        k_BHTD: pooled keys.
        window: side of the local window.
        routing: which heads are selected; None for all of them.
    """
    why = AGGREGATED_IMPLEMENTATIONS["cpu"].refusal(q_BHND, k_BHTD, window)
    if why is None:
        what = What(q_BHND.dtype, torch.is_grad_enabled() and q_BHND.requires_grad)
        limit, why = ruling("aggregated attention", "cpu", what, q_BHND.shape[3], q_BHND.shape[2])
        if limit >= 1.0 or (limit > 0.0 and routing is not None and share_of(routing) <= limit):
            return Choice("cpu", why)
    return Choice("portable", f"{why}; portable PyTorch computes every head, and unfolds nothing either")
