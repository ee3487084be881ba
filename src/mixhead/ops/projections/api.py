"""`project_to_heads` and `project_from_heads`: projections in which a head that is not selected costs nothing.

The query projection makes the rows of selected heads only, the output projection reads them only. The heads may as well
be experts with weights of their own (MoA, arXiv 2210.05144): all that counts is which rows meet which weights.

Shape legend: B batch, N tokens, C hidden size, H heads (or experts), D head dim (or width of an expert), M rows that
select one head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.ops.autocast import autocast_together
from mixhead.ops.choice import Choice
from mixhead.ops.crossover.rulings import What, ruling, share_selected
from mixhead.ops.engine import Engine, Run, asked_for
from mixhead.ops.projections.engine import Projections
from mixhead.ops.projections.engines import PROJECTIONS


def project_to_heads(
    hidden_BNC: Tensor, weight_HDC: Tensor, bias_HD: Tensor | None, selected_BNH: Tensor, *, impl: str = "auto"
) -> Tensor:
    """The queries of the selected heads: q_h = x W_h^T + b_h (MoH, arXiv 2410.11842, eq. 2, W_h the rows of head h).

    Args:
        hidden_BNC: hidden states.
        weight_HDC: weights of each head, or of each expert; `linear.weight.unflatten(0, (H, D))` of an `nn.Linear`.
        bias_HD: biases, or None.
        selected_BNH: bool, True where the token uses the head.
        impl: "auto" or one of `PROJECTIONS`.

    Returns:
        q_BHND, zero where a head is not selected, in the dtype of `hidden_BNC` (under autocast in its dtype).

    Raises:
        MixheadError: where shapes, dtypes or the name of the implementation do not fit, or where the implementation
            that was asked for cannot take these arguments here.
    """
    hidden_BNC, weight_HDC, bias_HD = together(hidden_BNC, weight_HDC, bias_HD)
    check_weight(weight_HDC, selected_BNH)
    heads, head_dim, hidden_size = weight_HDC.shape
    check("hidden_BNC", hidden_BNC, (*selected_BNH.shape[:2], hidden_size), weight_HDC)
    check("bias_HD", bias_HD, (heads, head_dim), weight_HDC)
    run = pick(impl, hidden_BNC, weight_HDC, selected_BNH)
    return run.to_heads(hidden_BNC, weight_HDC, bias_HD, selected_BNH)


def project_from_heads(
    out_BHND: Tensor,
    weight_HDC: Tensor,
    bias_C: Tensor | None,
    selected_BNH: Tensor,
    gates_BNH: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """The output projection of the selected heads: y = sum_h g_h out_h W_h + b (MoH, arXiv 2410.11842, eq. 4).

    Args:
        out_BHND: outputs of the heads; rows of heads that are not selected are never read into the result.
        weight_HDC: weights of each head, or of each expert; `weight_by_head(linear.weight, H)` of an `nn.Linear`.
        bias_C: bias, or None.
        selected_BNH: bool, True where the token uses the head.
        gates_BNH: weights of the heads; None where `head_attention` has applied them already.
        impl: "auto" or one of `PROJECTIONS`.

    Returns:
        [B, N, C] in the dtype of `out_BHND` (under autocast in its dtype); the bias alone where nothing is selected.

    Raises:
        MixheadError: where shapes, dtypes or the name of the implementation do not fit, or where the implementation
            that was asked for cannot take these arguments here.
    """
    out_BHND, weight_HDC, bias_C = together(out_BHND, weight_HDC, bias_C)
    check_weight(weight_HDC, selected_BNH)
    heads, head_dim, hidden_size = weight_HDC.shape
    batch, tokens = selected_BNH.shape[:2]
    check("out_BHND", out_BHND, (batch, heads, tokens, head_dim), weight_HDC)
    check("bias_C", bias_C, (hidden_size,), weight_HDC)
    if gates_BNH is not None and gates_BNH.shape != selected_BNH.shape:
        raise MixheadError(f"gates_BNH must be {list(selected_BNH.shape)}, got {list(gates_BNH.shape)}.")
    run = pick(impl, out_BHND, weight_HDC, selected_BNH)
    return run.from_heads(out_BHND, weight_HDC, bias_C, selected_BNH, gates_BNH)


ENGINES = ("cpu", "gathered")  # in the order of preference


def explain_projection(rows: Tensor, weight_HDC: Tensor, selected_BNH: Tensor) -> Choice:
    """Which implementation `impl="auto"` takes for a projection of `rows` (to or from heads), and why."""
    if rows.device.type != "cpu":
        return Choice("dense", f"counting selected heads would make the {rows.device.type} device wait for the host")
    if torch.compiler.is_compiling():
        return Choice("dense", "a compiled graph does not know how many heads are selected")
    num_rows, width = selected_BNH.shape[0] * selected_BNH.shape[1], weight_HDC.shape[1]
    if num_rows == 0 or weight_HDC.numel() == 0:
        return Choice("dense", "there is nothing to compute")
    what = What(dtype_of_products(rows), torch.is_grad_enabled() and (rows.requires_grad or weight_HDC.requires_grad))
    reasons, share = [], None
    for engine in ENGINES:
        why = PROJECTIONS[engine].refusal(rows)
        if why is None:
            limit, why = ruling("projection", engine, what, width, num_rows)
            if limit > 0.0:
                share = share_selected(selected_BNH) if share is None else share
                why = f"{share:.0%} of the heads are selected: {why}"
                if share <= limit:
                    return Choice(engine, why)
        reasons.append(why)
    return Choice("dense", "; ".join(reasons))


def pick(impl: str, rows: Tensor, weight_HDC: Tensor, selected_BNH: Tensor) -> Projections:
    """The projections of the engine that runs."""
    if impl == "auto":
        return PROJECTIONS[explain_projection(rows, weight_HDC, selected_BNH).impl].run
    return of_engine(impl, PROJECTIONS, rows, weight_HDC)


def of_engine(impl: str, engines: Mapping[str, Engine[Run]], rows: Tensor, weight: Tensor) -> Run:
    """What the engine of that name runs; where there is nothing to compute, the reference does."""
    engine = asked_for(impl, engines, rows)
    return engines["reference"].run if rows.numel() == 0 or weight.numel() == 0 else engine.run


def together(rows: Tensor, weight_HDC: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast all in its dtype, as `F.linear` takes them."""
    if bias is None:
        rows, weight_HDC = autocast_together(rows, weight_HDC)
        return rows, weight_HDC, None
    rows, weight_HDC, bias = autocast_together(rows, weight_HDC, bias)
    return rows, weight_HDC, bias


def dtype_of_products(rows: Tensor) -> torch.dtype:
    """The dtype in which `rows` will be multiplied: under autocast its own."""
    device_type = rows.device.type
    autocast = torch.is_autocast_enabled(device_type) and rows.dtype != torch.float64
    return torch.get_autocast_dtype(device_type) if autocast else rows.dtype


def check_weight(weight_HDC: Tensor, selected_BNH: Tensor) -> None:
    """Raises where the weight or the selection has not three dimensions, or they differ in the number of heads."""
    if weight_HDC.dim() != 3:
        raise MixheadError(f"weight_HDC must be [heads, head_dim, hidden_size], got {list(weight_HDC.shape)}.")
    heads = weight_HDC.shape[0]
    if selected_BNH.dim() != 3 or selected_BNH.shape[-1] != heads:
        raise MixheadError(f"selected_BNH must be [batch, tokens, {heads}], got {list(selected_BNH.shape)}.")
    if selected_BNH.dtype != torch.bool:
        raise MixheadError(f"selected_BNH must be torch.bool, got {selected_BNH.dtype}.")


def check(name: str, tensor: Tensor | None, shape: tuple[int, ...], weight_HDC: Tensor) -> None:
    """Raises where a tensor has another shape, or another dtype than the weight."""
    if tensor is None:
        return
    if tensor.shape != shape:
        raise MixheadError(f"{name} must be {list(shape)}, got {list(tensor.shape)}.")
    if tensor.dtype != weight_HDC.dtype:
        raise MixheadError(f"{name} is {tensor.dtype}, but the weight is {weight_HDC.dtype}: they must have one dtype.")
