"""The arguments of `aggregated_attention` as one value: checks, and what every implementation derives from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixhead.errors import MixheadError


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """Biases of pairs of queries and pooled keys that depend on their distance along both axes of the map.

    The axes are independent, so that a pair's bias lies in one row and one column of a short table.

    Attributes:
        table_HRS: the bias of every combination of a vertical and a horizontal distance.
        row_YU: int64, which row of the table belongs to a row of queries and a row of pooled keys.
        column_XV: int64, the same for columns. T = U * V.
    """

    table_HRS: Tensor
    row_YU: Tensor
    column_XV: Tensor

    def pairs_HNT(self) -> Tensor:
        """The bias of every pair, [H, Y * X, U * V]."""
        (queries_y, keys_u), (queries_x, keys_v) = self.row_YU.shape, self.column_XV.shape
        rows = self.table_HRS.index_select(1, self.row_YU.flatten())
        pairs = rows.index_select(2, self.column_XV.flatten())
        pairs = pairs.view(-1, queries_y, keys_u, queries_x, keys_v).transpose(2, 3)
        return pairs.reshape(-1, queries_y * queries_x, keys_u * keys_v)


@dataclass(frozen=True, eq=False)
class AggregatedArguments:
    """See `aggregated_attention`; gates and selection are None where every head has the gate 1."""

    q_BHND: Tensor
    k_BHND: Tensor
    v_BHND: Tensor
    k_BHTD: Tensor
    v_BHTD: Tensor
    gates_BNH: Tensor | None
    selected_BNH: Tensor | None
    size: tuple[int, int]
    query_embedding_HD: Tensor
    temperature_H: Tensor
    local_bias_HL: Tensor
    pool_bias: RelativeBias
    learnable_tokens_HDL: Tensor
    learnable_bias_HL: Tensor

    @property
    def window(self) -> int:
        """Side of the local window."""
        return math.isqrt(self.local_bias_HL.shape[-1])

    def check(self) -> None:
        """Raises a `MixheadError` that names the argument, the expected shape and the one received."""
        if self.q_BHND.dim() != 4 or self.k_BHTD.dim() != 4:
            raise MixheadError(
                "q_BHND and k_BHTD must have 4 dimensions [batch, heads, tokens, head_dim], got "
                f"{list(self.q_BHND.shape)} and {list(self.k_BHTD.shape)}."
            )
        batch, heads, queries, head_dim = self.q_BHND.shape
        keys, window = self.k_BHTD.shape[2], self.local_bias_HL.shape[-1]
        if self.size[0] * self.size[1] != queries:
            raise MixheadError(f"size={self.size} has not as many places as there are queries, {queries}.")
        if math.isqrt(window) ** 2 != window or window % 2 == 0:
            raise MixheadError(f"local_bias_HL has {window} window positions, but that must be 1, 9, 25, ...")
        expected = {
            "k_BHND": (batch, heads, queries, head_dim),
            "v_BHND": (batch, heads, queries, head_dim),
            "k_BHTD": (batch, heads, keys, head_dim),
            "v_BHTD": (batch, heads, keys, head_dim),
            "gates_BNH": (batch, queries, heads),
            "selected_BNH": (batch, queries, heads),
            "query_embedding_HD": (heads, head_dim),
            "temperature_H": (heads,),
            "local_bias_HL": (heads, window),
            "learnable_tokens_HDL": (heads, head_dim, window),
            "learnable_bias_HL": (heads, window),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise MixheadError(f"{name} must be {list(shape)}, got {list(tensor.shape)}.")
        self._check_pool_bias(heads, keys)

    def _check_pool_bias(self, heads: int, keys: int) -> None:
        bias = self.pool_bias
        if bias.table_HRS.dim() != 3 or bias.table_HRS.shape[0] != heads:
            raise MixheadError(f"The table of pool_bias must be [{heads}, R, S], got {list(bias.table_HRS.shape)}.")
        shapes = bias.row_YU.shape, bias.column_XV.shape
        if [len(shape) for shape in shapes] != [2, 2] or (shapes[0][0], shapes[1][0]) != self.size:
            raise MixheadError(
                f"row_YU and column_XV of pool_bias must be [{self.size[0]}, U] and [{self.size[1]}, V], got "
                f"{list(shapes[0])} and {list(shapes[1])}."
            )
        if shapes[0][1] * shapes[1][1] != keys:
            raise MixheadError(f"pool_bias is for {shapes[0][1]} x {shapes[1][1]} pooled keys, but there are {keys}.")

    def unit_queries_BHND(self) -> Tensor:
        """u(q)."""
        return F.normalize(self.q_BHND, dim=-1)

    def scaled_queries_BHND(self, unit_BHND: Tensor) -> Tensor:
        """s: unit queries with their embedding, times temperature and the logarithm of the number of keys."""
        embedded_BHND = unit_BHND + self.query_embedding_HD.unsqueeze(1)
        return embedded_BHND * self.temperature_H.view(-1, 1, 1) * self.log_keys_N().to(unit_BHND.dtype).unsqueeze(-1)

    def log_keys_N(self) -> Tensor:
        """The logarithm of the number of keys that each query sees, float32."""
        reach, (rows, columns) = self.window // 2, self.size
        in_rows_Y, in_columns_X = (window_overlap(n, reach, self.q_BHND.device) for n in (rows, columns))
        count_YX = in_rows_Y.unsqueeze(1) * in_columns_X + self.k_BHTD.shape[2]
        return count_YX.flatten().log()

    def gated(self, heads_BHND: Tensor) -> Tensor:
        """Heads times their gates, zero where one is not selected."""
        if self.gates_BNH is None or self.selected_BNH is None:
            return heads_BHND
        gates_BHN1 = self.gates_BNH.to(heads_BHND.dtype).transpose(1, 2).unsqueeze(-1)
        return torch.where(self.selected_BNH.transpose(1, 2).unsqueeze(-1), heads_BHND * gates_BHN1, 0.0)


def window_overlap(length: int, reach: int, device: torch.device) -> Tensor:
    """How many places of a window of 2 * reach + 1 lie inside an axis, for each place on it: float32."""
    place = torch.arange(length, device=device)
    last = (place + reach).clamp(max=length - 1)
    return (last - (place - reach).clamp(min=0) + 1).float()
