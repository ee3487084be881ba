"""`project_to_heads` and `project_from_heads`: projections in which a head that is not selected costs nothing.

The query projection makes the rows of selected heads only, the output projection reads them only. The heads may as well
be experts with weights of their own (MoA, arXiv 2210.05144): all that counts is which rows meet which weights.

Shape legend: B batch, N tokens, C hidden size, H heads (or experts), D head dim (or width of an expert), M rows that
select one head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixhead.errors import MixheadError
from mixhead.ops.autocast import autocast_together
from mixhead.ops.choice import Choice
from mixhead.ops.cpu import projections as cpu_projections
from mixhead.ops.crossover.rulings import What, ruling, share_selected
from mixhead.ops.engine import Engine, Run, asked_for, table


class Projections(NamedTuple):
    """The two projections of one engine, where what is not selected is 0.

    Attributes:
        to_heads: (hidden_BNC, weight_HDC, bias_HD, selected_BNH) to [B, H, N, D].
        from_heads: (out_BHND, weight_HDC, bias_C, selected_BNH, gates_BNH) to [B, N, C].
    """

    to_heads: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
    from_heads: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor | None], Tensor]


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


def weight_by_head(weight_CX: Tensor, num_heads: int) -> Tensor:
    """The weight [C, H D] of an output projection as the weights of its heads, a view [H, D, C]."""
    return weight_CX.unflatten(1, (num_heads, -1)).permute(1, 2, 0)


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


# The reference: the masked mathematics, one line a step.


def reference_to_heads(hidden_BNC: Tensor, weight_HDC: Tensor, bias_HD: Tensor | None, selected_BNH: Tensor) -> Tensor:
    """All queries by einsum, those that are not selected replaced by 0."""
    q_BHND = torch.einsum("bnc,hdc->bhnd", hidden_BNC, weight_HDC)
    if bias_HD is not None:
        q_BHND = q_BHND + bias_HD[:, None]
    return torch.where(by_head(selected_BNH), q_BHND, 0.0)


def reference_from_heads(
    out_BHND: Tensor, weight_HDC: Tensor, bias_C: Tensor | None, selected_BNH: Tensor, gates_BNH: Tensor | None
) -> Tensor:
    """The sum over all heads by einsum, those that are not selected replaced by 0."""
    gated_BHND = out_BHND if gates_BNH is None else out_BHND * by_head(gates_BNH).to(out_BHND.dtype)
    y_BNC = torch.einsum("bhnd,hdc->bnc", torch.where(by_head(selected_BNH), gated_BHND, 0.0), weight_HDC)
    return y_BNC if bias_C is None else y_BNC + bias_C


def by_head(x_BNH: Tensor) -> Tensor:
    """[B, N, H] as [B, H, N, 1], beside the rows of the heads."""
    return x_BNH.transpose(1, 2).unsqueeze(-1)


# Dense: one product over all heads, what sparsity has to beat.


def dense_to_heads(hidden_BNC: Tensor, weight_HDC: Tensor, bias_HD: Tensor | None, selected_BNH: Tensor) -> Tensor:
    """`F.linear` to all heads, then 0 where a head is not selected."""
    bias_X = None if bias_HD is None else bias_HD.flatten()
    q_BNX = F.linear(hidden_BNC, weight_HDC.flatten(0, 1), bias_X)
    q_BNHD = q_BNX.unflatten(-1, weight_HDC.shape[:2])
    return torch.where(selected_BNH.unsqueeze(-1), q_BNHD, 0.0).transpose(1, 2)


def dense_from_heads(
    out_BHND: Tensor, weight_HDC: Tensor, bias_C: Tensor | None, selected_BNH: Tensor, gates_BNH: Tensor | None
) -> Tensor:
    """0 where a head is not selected, then `F.linear` from all heads."""
    out_BNHD = out_BHND.transpose(1, 2)
    gated_BNHD = out_BNHD if gates_BNH is None else out_BNHD * gates_BNH.unsqueeze(-1).to(out_BHND.dtype)
    kept_BNHD = torch.where(selected_BNH.unsqueeze(-1), gated_BNHD, 0.0)
    return F.linear(kept_BNHD.flatten(2), weight_HDC.permute(2, 0, 1).flatten(1), bias_C)


# Gathered: a loop over the heads, portable PyTorch with any derivative.


def gathered_to_heads(hidden_BNC: Tensor, weight_HDC: Tensor, bias_HD: Tensor | None, selected_BNH: Tensor) -> Tensor:
    """One product for the rows of each head."""
    batch, tokens, _ = selected_BNH.shape
    hidden_RC, selected_HR = hidden_BNC.flatten(0, 1), selected_BNH.flatten(0, 1).T
    q_HRD = []
    for head, weight_DC in enumerate(weight_HDC.unbind()):
        row_M = selected_HR[head].nonzero().squeeze(1)
        x_MC = hidden_RC.index_select(0, row_M)
        q_MD = F.linear(x_MC, weight_DC, None if bias_HD is None else bias_HD[head])
        q_HRD.append(q_MD.new_zeros(batch * tokens, q_MD.shape[1]).index_copy(0, row_M, q_MD))
    return torch.stack(q_HRD, 1).unflatten(0, (batch, tokens)).transpose(1, 2)


def gathered_from_heads(
    out_BHND: Tensor, weight_HDC: Tensor, bias_C: Tensor | None, selected_BNH: Tensor, gates_BNH: Tensor | None
) -> Tensor:
    """One product for the rows of each head, added to the rows of the result."""
    batch, tokens, _ = selected_BNH.shape
    out_HRD, selected_HR = out_BHND.transpose(0, 1).flatten(1, 2), selected_BNH.flatten(0, 1).T
    y_RC = out_BHND.new_zeros(batch * tokens, weight_HDC.shape[2])
    for head, weight_DC in enumerate(weight_HDC.unbind()):
        row_M = selected_HR[head].nonzero().squeeze(1)
        out_MD = out_HRD[head].index_select(0, row_M)
        if gates_BNH is not None:
            gate_M = gates_BNH.flatten(0, 1)[:, head].index_select(0, row_M)
            out_MD = out_MD * gate_M.unsqueeze(1).to(out_MD.dtype)
        y_RC.index_add_(0, row_M, out_MD @ weight_DC)
    y_BNC = y_RC.unflatten(0, (batch, tokens))
    return y_BNC if bias_C is None else y_BNC + bias_C


PROJECTIONS = table(
    Engine("reference", Projections(reference_to_heads, reference_from_heads)),
    Engine("dense", Projections(dense_to_heads, dense_from_heads)),
    Engine("gathered", Projections(gathered_to_heads, gathered_from_heads)),
    Engine("cpu", Projections(cpu_projections.to_heads, cpu_projections.from_heads), cpu_projections.refusal),
)
