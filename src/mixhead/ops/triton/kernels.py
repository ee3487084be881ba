"""The kernels. Only `operators` imports this file, and only when it runs: Triton is optional.

A program of the forward and of the query gradient takes one head and `ROWS` of the tokens that selected it, in the
order of their positions; it ends at once where there are none left. A program of the key gradient takes one block of
`KEYS` keys of one key-value head, and walks over the tokens that selected any of its query heads. So every number of a
result is written by one program, in a fixed order: nothing is added atomically, and results repeat.

Shape legend: B batch, N queries, T keys, H query heads, K key-value heads, D head dim; M the rows and X the keys of one
block, W the head dim padded to a power of two. Rows of a tensor [B, H, N, ...] are reached by its strides; gates,
positions, counts and all gradients but those of q, k and v are contiguous [B, H, N].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: D103
    # Triton's interpreter multiplies bfloat16 wrongly.
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def scores(  # type: ignore[no-untyped-def]  # noqa: D103
    q_MW, k_XW, mask, mask_row, mask_key, row_M, key_X, row_ok_M, offset, num_keys, scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # Scaled and masked scores of a block, -inf where a row may not attend. MASK: 0 none, 1 bool, 2 added.
    s_MX = product(q_MW, tl.trans(k_XW), INTERPRETED) * scale
    allowed_MX = row_ok_M[:, None] & (key_X < num_keys)[None, :]
    if CAUSAL:
        allowed_MX = allowed_MX & (key_X[None, :] <= row_M[:, None] + offset)
    if MASK > 0:
        pointer_MX = mask + row_M[:, None] * mask_row + key_X[None, :] * mask_key
        if MASK == 1:
            allowed_MX = allowed_MX & (tl.load(pointer_MX, mask=allowed_MX, other=0) != 0)
        else:
            s_MX += tl.load(pointer_MX, mask=allowed_MX, other=0.0).to(tl.float32)
    return tl.where(allowed_MX, s_MX, float("-inf"))


@triton.jit
def forward(  # type: ignore[no-untyped-def]  # noqa: D103
    q, q_b, q_h, q_n, q_d, k, k_b, k_h, k_n, k_d, v, v_b, v_h, v_n, v_d,
    mask, mask_b, mask_h, mask_row, mask_key,
    gates, positions, ranks,
    out, plain, o_b, o_h, o_n, log_sums,
    heads, groups, num_queries, num_keys, head_dim, scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, KEEP: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(num_queries, ROWS)
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    h = (tl.program_id(0) // blocks % heads).to(tl.int64)
    list_start = (b * heads + h) * num_queries
    count = tl.load(ranks + list_start + num_queries - 1)
    start = tl.program_id(0) % blocks * ROWS
    if start < count:
        place_M = start + tl.arange(0, ROWS)
        ok_M = place_M < count
        row_M = tl.load(positions + list_start + place_M, mask=ok_M, other=0)
        column_W = tl.arange(0, WIDTH)
        column_ok_W = column_W < head_dim
        ok_MW = ok_M[:, None] & column_ok_W[None, :]
        q_MW = tl.load(q + b * q_b + h * q_h + row_M[:, None] * q_n + column_W[None, :] * q_d, mask=ok_MW, other=0.0)
        k_head = k + b * k_b + (h // groups) * k_h
        v_head = v + b * v_b + (h // groups) * v_h
        mask_head = mask + b * mask_b + h * mask_h
        offset = num_keys - num_queries
        end = num_keys
        if CAUSAL:  # The last row of a block sees the most.
            end = tl.minimum(num_keys, tl.maximum(tl.max(row_M, 0) + 1 + offset, 0))

        most_M = tl.full([ROWS], float("-inf"), tl.float32)
        sum_M = tl.zeros([ROWS], tl.float32)
        sum_MW = tl.zeros([ROWS, WIDTH], tl.float32)
        for first in range(0, end, KEYS):
            key_X = (first + tl.arange(0, KEYS)).to(tl.int64)
            ok_XW = (key_X < num_keys)[:, None] & column_ok_W[None, :]
            k_XW = tl.load(k_head + key_X[:, None] * k_n + column_W[None, :] * k_d, mask=ok_XW, other=0.0)
            v_XW = tl.load(v_head + key_X[:, None] * v_n + column_W[None, :] * v_d, mask=ok_XW, other=0.0)
            s_MX = scores(
                q_MW, k_XW, mask_head, mask_row, mask_key, row_M, key_X, ok_M, offset, num_keys, scale,
                CAUSAL, MASK, INTERPRETED,
            )  # fmt: skip
            higher_M = tl.maximum(most_M, tl.max(s_MX, 1))
            # A row that has seen nothing yet has no maximum, and -inf - -inf is NaN.
            base_M = tl.where(higher_M == float("-inf"), 0.0, higher_M)
            p_MX = tl.exp(s_MX - base_M[:, None])
            shrink_M = tl.exp(most_M - base_M)
            sum_M = sum_M * shrink_M + tl.sum(p_MX, 1)
            sum_MW = sum_MW * shrink_M[:, None] + product(p_MX.to(v_XW.dtype), v_XW, INTERPRETED)
            most_M = higher_M

        blind_M = sum_M == 0.0
        o_MW = sum_MW / tl.where(blind_M, 1.0, sum_M)[:, None]
        gate_M = tl.load(gates + list_start + row_M, mask=ok_M, other=0.0).to(tl.float32)
        place_MW = b * o_b + h * o_h + row_M[:, None] * o_n + column_W[None, :]
        tl.store(out + place_MW, (o_MW * gate_M[:, None]).to(out.dtype.element_ty), mask=ok_MW)
        if KEEP:
            tl.store(plain + place_MW, o_MW.to(plain.dtype.element_ty), mask=ok_MW)
            # +inf, so that in the gradient exp(score - log_sum) is 0 for a row that may attend to nothing.
            log_sum_M = tl.where(blind_M, float("inf"), most_M + tl.log(tl.where(blind_M, 1.0, sum_M)))
            tl.store(log_sums + list_start + row_M, log_sum_M, mask=ok_M)


@triton.jit
def query_gradient(  # type: ignore[no-untyped-def]  # noqa: D103
    grad, g_b, g_h, g_n, g_d, q, q_b, q_h, q_n, q_d, k, k_b, k_h, k_n, k_d, v, v_b, v_h, v_n, v_d,
    mask, mask_b, mask_h, mask_row, mask_key,
    gates, positions, ranks, plain, log_sums,
    dq, dgates, o_b, o_h, o_n,
    heads, groups, num_queries, num_keys, head_dim, scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(num_queries, ROWS)
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    h = (tl.program_id(0) // blocks % heads).to(tl.int64)
    list_start = (b * heads + h) * num_queries
    count = tl.load(ranks + list_start + num_queries - 1)
    start = tl.program_id(0) % blocks * ROWS
    if start < count:
        place_M = start + tl.arange(0, ROWS)
        ok_M = place_M < count
        row_M = tl.load(positions + list_start + place_M, mask=ok_M, other=0)
        column_W = tl.arange(0, WIDTH)
        column_ok_W = column_W < head_dim
        ok_MW = ok_M[:, None] & column_ok_W[None, :]
        q_MW = tl.load(q + b * q_b + h * q_h + row_M[:, None] * q_n + column_W[None, :] * q_d, mask=ok_MW, other=0.0)
        g_MW = tl.load(grad + b * g_b + h * g_h + row_M[:, None] * g_n + column_W[None, :] * g_d, mask=ok_MW, other=0.0)
        place_MW = b * o_b + h * o_h + row_M[:, None] * o_n + column_W[None, :]
        plain_MW = tl.load(plain + place_MW, mask=ok_MW, other=0.0)
        # The gradient of a gate is what the head's output adds to the loss.
        dgate_M = tl.sum(g_MW.to(tl.float32) * plain_MW.to(tl.float32), 1)
        tl.store(dgates + list_start + row_M, dgate_M, mask=ok_M)
        gate_M = tl.load(gates + list_start + row_M, mask=ok_M, other=0.0).to(tl.float32)
        log_sum_M = tl.load(log_sums + list_start + row_M, mask=ok_M, other=float("inf"))
        k_head = k + b * k_b + (h // groups) * k_h
        v_head = v + b * v_b + (h // groups) * v_h
        mask_head = mask + b * mask_b + h * mask_h
        offset = num_keys - num_queries
        end = num_keys
        if CAUSAL:
            end = tl.minimum(num_keys, tl.maximum(tl.max(row_M, 0) + 1 + offset, 0))

        dq_MW = tl.zeros([ROWS, WIDTH], tl.float32)
        for first in range(0, end, KEYS):
            key_X = (first + tl.arange(0, KEYS)).to(tl.int64)
            ok_XW = (key_X < num_keys)[:, None] & column_ok_W[None, :]
            k_XW = tl.load(k_head + key_X[:, None] * k_n + column_W[None, :] * k_d, mask=ok_XW, other=0.0)
            v_XW = tl.load(v_head + key_X[:, None] * v_n + column_W[None, :] * v_d, mask=ok_XW, other=0.0)
            s_MX = scores(
                q_MW, k_XW, mask_head, mask_row, mask_key, row_M, key_X, ok_M, offset, num_keys, scale,
                CAUSAL, MASK, INTERPRETED,
            )  # fmt: skip
            p_MX = tl.exp(s_MX - log_sum_M[:, None])
            dp_MX = product(g_MW, tl.trans(v_XW), INTERPRETED)
            ds_MX = p_MX * (dp_MX - dgate_M[:, None]) * gate_M[:, None]
            dq_MW += product(ds_MX.to(k_XW.dtype), k_XW, INTERPRETED)
        tl.store(dq + place_MW, (dq_MW * scale).to(dq.dtype.element_ty), mask=ok_MW)


@triton.jit
def key_gradient(  # type: ignore[no-untyped-def]  # noqa: D103
    grad, g_b, g_h, g_n, g_d, q, q_b, q_h, q_n, q_d, k, k_b, k_h, k_n, k_d, v, v_b, v_h, v_n, v_d,
    mask, mask_b, mask_h, mask_row, mask_key,
    gates, positions, ranks, log_sums, dgates,
    dk, dv, o_b, o_h, o_n,
    heads, groups, num_queries, num_keys, head_dim, scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    kv_heads = heads // groups
    blocks = tl.cdiv(num_keys, KEYS)
    b = (tl.program_id(0) // blocks // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) // blocks % kv_heads).to(tl.int64)
    first_key = tl.program_id(0) % blocks * KEYS
    key_X = first_key.to(tl.int64) + tl.arange(0, KEYS)
    column_W = tl.arange(0, WIDTH)
    column_ok_W = column_W < head_dim
    ok_XW = (key_X < num_keys)[:, None] & column_ok_W[None, :]
    k_head = k + b * k_b + kv_head * k_h
    v_head = v + b * v_b + kv_head * v_h
    k_XW = tl.load(k_head + key_X[:, None] * k_n + column_W[None, :] * k_d, mask=ok_XW, other=0.0)
    v_XW = tl.load(v_head + key_X[:, None] * v_n + column_W[None, :] * v_d, mask=ok_XW, other=0.0)
    offset = num_keys - num_queries
    dk_XW = tl.zeros([KEYS, WIDTH], tl.float32)
    dv_XW = tl.zeros([KEYS, WIDTH], tl.float32)

    for member in range(groups):
        h = kv_head * groups + member
        list_start = (b * heads + h) * num_queries
        count = tl.load(ranks + list_start + num_queries - 1)
        mask_head = mask + b * mask_b + h * mask_h
        begin = 0
        if CAUSAL:  # Tokens before position `earliest` see none of these keys: begin after the last of them.
            earliest = first_key - offset
            before = tl.minimum(earliest, num_queries) - 1
            begin = tl.load(ranks + list_start + before, mask=before >= 0, other=0)
        for start in range(begin, count, ROWS):
            place_M = start + tl.arange(0, ROWS)
            ok_M = place_M < count
            row_M = tl.load(positions + list_start + place_M, mask=ok_M, other=0)
            ok_MW = ok_M[:, None] & column_ok_W[None, :]
            q_MW = tl.load(
                q + b * q_b + h * q_h + row_M[:, None] * q_n + column_W[None, :] * q_d, mask=ok_MW, other=0.0
            )
            g_MW = tl.load(
                grad + b * g_b + h * g_h + row_M[:, None] * g_n + column_W[None, :] * g_d, mask=ok_MW, other=0.0
            )
            gate_M = tl.load(gates + list_start + row_M, mask=ok_M, other=0.0).to(tl.float32)
            dgate_M = tl.load(dgates + list_start + row_M, mask=ok_M, other=0.0)
            log_sum_M = tl.load(log_sums + list_start + row_M, mask=ok_M, other=float("inf"))
            s_MX = scores(
                q_MW, k_XW, mask_head, mask_row, mask_key, row_M, key_X, ok_M, offset, num_keys, scale,
                CAUSAL, MASK, INTERPRETED,
            )  # fmt: skip
            p_MX = tl.exp(s_MX - log_sum_M[:, None])
            dv_XW += product(tl.trans((p_MX * gate_M[:, None]).to(g_MW.dtype)), g_MW, INTERPRETED)
            dp_MX = product(g_MW, tl.trans(v_XW), INTERPRETED)
            ds_MX = p_MX * (dp_MX - dgate_M[:, None]) * gate_M[:, None]
            dk_XW += product(tl.trans(ds_MX.to(q_MW.dtype)), q_MW, INTERPRETED)

    place_XW = b * o_b + kv_head * o_h + key_X[:, None] * o_n + column_W[None, :]
    tl.store(dk + place_XW, (dk_XW * scale).to(dk.dtype.element_ty), mask=ok_XW)
    tl.store(dv + place_XW, dv_XW.to(dv.dtype.element_ty), mask=ok_XW)


# Whether TRITON_INTERPRET=1 stood in the environment when Triton was imported: kernels then run on the CPU, slowly.
INTERPRETED = not isinstance(forward, triton.JITFunction)
