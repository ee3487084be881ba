"""Writes arguments of the C++ operators, and what the reference makes of them, for the program in main.cpp."""

import math
import struct
import sys
from pathlib import Path

import torch
from torch import Tensor

from mixhead.ops import RelativeBias
from mixhead.ops.aggregated import reference as aggregated_reference
from mixhead.ops.aggregated.arguments import AggregatedArguments
from mixhead.ops.attention import reference
from mixhead.ops.glu.reference import glu as glu_reference
from mixhead.ops.projections.reference import from_heads as reference_from_heads
from mixhead.ops.projections.reference import to_heads as reference_to_heads
from mixhead.routing import LinearRouter, Routing

DTYPES = (torch.float32, torch.bfloat16, torch.bool, torch.int64)  # by number, as in pytorch.h
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 3e-2}


class Result(int):
    """An argument: that result of the case before."""


class Given(Tensor):
    """An argument that the schema says is optional, where it is given."""


def integers(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)


def text(words: str) -> bytes:
    return integers(len(words)) + words.encode()


def tensor(x: Tensor) -> bytes:
    x = x.detach().as_subclass(Tensor).contiguous()
    data = x.flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b""
    return integers(DTYPES.index(x.dtype), x.dim(), *x.shape, len(data)) + data


def argument(x: Tensor | float | None) -> bytes:
    if x is None:
        return b"n"
    if isinstance(x, Given):
        return b"o" + tensor(x)
    if isinstance(x, Tensor):
        return b"t" + tensor(x)
    if isinstance(x, Result):
        return b"r" + integers(x)
    return b"i" + (struct.pack("<d", x) if isinstance(x, float) else integers(int(x)))


SEPARATE, AS_LIST, IN_PLACE = range(3)  # how an operator returns: by number, as in main.cpp


def case(name, title, arguments, expected, dtype, *, returns=SEPARATE) -> bytes:
    """`expected`: a tensor for each result, None where it is not compared; in place it is the first argument."""
    head = text(name) + text(title) + integers(len(arguments), len(expected), returns)
    head += struct.pack("<d", TOLERANCE[dtype])
    results = [b"n" if x is None else b"t" + tensor(x.to(dtype)) for x in expected]
    return b"".join([head, *map(argument, arguments), *results])


def given(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.as_subclass(Given)


def leaves(*tensors: Tensor) -> list[Tensor]:
    """In float64, with gradients."""
    return [t.detach().as_subclass(Tensor).double().requires_grad_() for t in tensors]


def attention(queries, keys, heads=4, kv_heads=4, dim=64, causal=False, mask=None, share=0.6, dtype=torch.float32):
    title = f"{queries} x {keys}, {heads} of {kv_heads} heads, {dim} wide, causal {causal}, {mask}, {share}, {dtype}"
    q = torch.randn(2, heads, queries, dim).to(dtype)
    k, v = (torch.randn(2, kv_heads, keys, dim).to(dtype) for _ in range(2))
    selected = torch.rand(2, queries, heads) < share
    gates = torch.rand(2, queries, heads).add(0.5).to(dtype) * selected
    bias = {
        None: None,
        "boolean": torch.rand(2, 1, queries, keys) < 0.8,
        "float": torch.randn(1, heads, queries, keys),
    }[mask]
    scale = 1 / math.sqrt(dim)
    grad = torch.randn_like(q)
    inputs = leaves(q, k, v, gates)
    wide = bias.double() if bias is not None and bias.is_floating_point() else bias
    routing = Routing(inputs[3], selected)
    out = reference.attend(*inputs[:3], routing, causal=causal, scale=scale, attn_mask=wide)
    dq, dk, dv, dgates = torch.autograd.grad(out, inputs, grad.double())
    options = (given(bias), causal, scale)
    yield case("attend_cpu_inference", title, (q, k, v, gates, selected, *options), [out], dtype)
    yield case("attend_cpu", title, (q, k, v, gates, selected, *options), [out, None], dtype)
    backward = (grad, q, k, v, gates, selected, given(bias), Result(0), Result(1), causal, scale)
    yield case("attend_cpu_backward", title, backward, [dq, dk, dv, dgates * selected], dtype)


def projections(rows=37, heads=3, dim=20, hidden=50, bias=True, gated=True):
    title = f"{rows} rows, {heads} heads of {dim}, {hidden} hidden, bias {bias}, gates {gated}"
    x, weight = torch.randn(2, rows, hidden), torch.randn(heads, dim, hidden)
    heads_rows, grad_rows = torch.randn(2, heads, rows, dim), torch.randn(2, rows, hidden)
    selected = torch.rand(2, rows, heads) < 0.5
    bias_HD, bias_C = (torch.randn(heads, dim), torch.randn(hidden)) if bias else (None, None)
    gates = torch.rand(2, rows, heads) * selected if gated else None
    float32 = torch.float32

    wide_x, wide_weight, wide_bias = leaves(x, weight, torch.zeros(heads, dim) if bias_HD is None else bias_HD)
    to = reference_to_heads(wide_x, wide_weight, wide_bias, selected)
    gradients = torch.autograd.grad(to, (wide_x, wide_weight, wide_bias), heads_rows.double())
    yield case("project_to_heads_cpu", title, (x, weight, given(bias_HD), selected), [to], float32)
    backward = (heads_rows, x, weight, selected, bias)
    yield case(
        "project_to_heads_cpu_backward", title, backward, [*gradients[:2], gradients[2] if bias else None], float32
    )

    wide_rows, wide_weight, wide_gates = leaves(heads_rows, weight, gates if gated else torch.ones(2, rows, heads))
    wide_bias_C = None if bias_C is None else bias_C.double()
    back = reference_from_heads(wide_rows, wide_weight, wide_bias_C, selected, wide_gates)
    gradients = torch.autograd.grad(back, (wide_rows, wide_weight, wide_gates), grad_rows.double())
    arguments = (heads_rows, weight, given(bias_C), selected, given(gates))
    yield case("project_from_heads_cpu", title, arguments, [back], float32)
    backward = (grad_rows, heads_rows, weight, selected, given(gates))
    expected = [*gradients[:2], gradients[2] * selected if gated else None]
    yield case("project_from_heads_cpu_backward", title, backward, expected, float32)


def aggregated(size, pooled, window, dim=24, heads=3, gated=True):
    title = f"{size}, {pooled} pooled, windows of {window}, {dim} wide, gates {gated}"
    tokens = size[0] * size[1]
    q, k, v = (torch.randn(2, heads, tokens, dim) for _ in range(3))
    pool_k, pool_v = (torch.randn(2, heads, pooled[0] * pooled[1], dim) for _ in range(2))
    selected = torch.rand(2, tokens, heads) < 0.6 if gated else None
    gates = torch.rand(2, tokens, heads) * selected if gated else None
    embedding, temperature = torch.randn(heads, dim), torch.rand(heads) + 0.5
    local_bias, table = torch.randn(heads, window**2), torch.randn(heads, 5, 4)
    learnt, learnt_bias = torch.randn(heads, dim, window**2), torch.randn(heads, window**2)
    rows, columns = torch.randint(5, (size[0], pooled[0])), torch.randint(4, (size[1], pooled[1]))
    grad = torch.randn(2, heads, tokens, dim)

    wide = leaves(q, k, v, pool_k, pool_v, embedding, temperature, local_bias, table, learnt, learnt_bias)
    wide_gates = gates.double().requires_grad_() if gated else None
    bias = RelativeBias(wide[8], rows, columns)
    out = aggregated_reference.attend(
        AggregatedArguments(*wide[:5], wide_gates, selected, size, *wide[5:8], bias, *wide[9:])
    )
    gradients = torch.autograd.grad(out, [*wide, *([wide_gates] if gated else [])], grad.double())
    parameters = (embedding, temperature, local_bias, table, learnt, learnt_bias, rows, columns)
    inputs = (q, k, v, pool_k, pool_v, given(gates), given(selected), size[0], *parameters)
    yield case("aggregate_cpu", title, inputs, [out, None], torch.float32)
    expected = [*gradients[:5], gradients[11] * selected if gated else None, *gradients[5:11]]
    yield case("aggregate_cpu_backward", title, (grad, *inputs, Result(1)), expected, torch.float32, returns=AS_LIST)


def glu(size, channels, dtype):
    title = f"{size}, {channels} channels, {dtype}"
    hidden = torch.randn(3, size[0] * size[1], 2 * channels).to(dtype)
    parameters = torch.randn(2 * channels), torch.randn(channels, 3, 3) / 3, torch.randn(channels)
    grad = torch.randn(3, size[0] * size[1], channels).to(dtype)
    wide = leaves(hidden, *parameters)
    out = glu_reference(*wide, size)
    gradients = torch.autograd.grad(out, wide, grad.double())
    yield case("convolutional_glu_cpu", title, (hidden, *parameters, size[0]), [out], dtype)
    backward = (grad, hidden, *parameters, size[0])
    yield case("convolutional_glu_cpu_backward", title, backward, [gradients[0], None, None, None], dtype)
    if dtype == torch.float32:
        yield case("convolutional_glu_cpu_backward", title, backward, gradients, dtype)


def routing(tokens=5, heads=6, shared=2, active=4, groups=1, hidden=50, dtype=torch.float32):
    title = f"{tokens} tokens, {active} of {heads} heads, {shared} shared, {groups} groups, {hidden} hidden, {dtype}"
    router = LinearRouter(hidden, heads, shared, active, groups).requires_grad_(False)
    weight, bias = (torch.randn_like(x).to(dtype) for x in (router.score_proj.weight, router.score_proj.bias))
    x = torch.randn(2, tokens, hidden).to(dtype)
    routed = router.route(x.float() @ weight.float().T + bias.float(), None)
    inputs = (x, weight, bias, router.shared_H, active, groups)
    yield case("route_linear_cpu", title, inputs, [routed.gates_BNH, None, routed.probs_BNH], torch.float32)

    out = torch.randn(2, heads, tokens, 20).to(dtype)
    skipped = torch.randn(heads, 20).to(dtype)
    gates, selected = (torch.rand(2, tokens, heads) + 0.5).to(dtype), routed.selected_BNH
    selected_BHN1, gates_BHN1 = (t.transpose(1, 2).unsqueeze(-1) for t in (selected, gates))
    gated = torch.where(selected_BHN1, out.double() * gates_BHN1, 0.0)
    yield case("gate_heads_cpu", title, (out, gates, selected), [gated], dtype, returns=IN_PLACE)
    by_token = out.transpose(1, 2)
    filled = torch.where(selected.unsqueeze(-1), by_token, skipped)
    yield case("fill_skipped_cpu", title, (by_token, selected, skipped), [filled], dtype, returns=IN_PLACE)

    if tokens == 1:
        q, (k, v) = torch.randn(2, heads, 1, 20), (torch.randn(2, heads // 2, 70, 20) for _ in range(2))
        q, k, v = (t.to(dtype) for t in (q, k, v))
        attended = reference.attend(*leaves(q, k, v), routed, causal=False, scale=0.2, attn_mask=None)
        decoded = torch.where(selected.unsqueeze(-1), attended.transpose(1, 2), skipped.double())
        arguments = (*inputs[:4], given(skipped), q, k, v, active, groups, 0.2)
        yield case("decode_routed_cpu", title, arguments, [decoded], dtype)


def cases():
    for dtype in (torch.float32, torch.bfloat16):
        for queries, keys in ((1, 1), (17, 17), (70, 130), (130, 70), (197, 197)):
            yield from attention(queries, keys, causal=queries % 2 == 1, dtype=dtype)
        yield from attention(1, 600, kv_heads=2, causal=True, dtype=dtype)  # decoding, grouped queries
        yield from attention(3, 45, kv_heads=1, dim=80, mask="boolean", dtype=dtype)
        yield from attention(65, 65, kv_heads=2, dim=63, mask="boolean", dtype=dtype)
        yield from attention(33, 90, dim=12, causal=True, mask="float", dtype=dtype)
        for dim in (8, 16, 24, 32, 48, 72, 100, 128, 200, 256):
            yield from attention(67, 131, dim=dim, kv_heads=2, causal=True, dtype=dtype)
            yield from attention(2, 131, dim=dim, kv_heads=2, causal=True, dtype=dtype)
        yield from attention(70, 70, share=0.0, dtype=dtype)  # nobody selects anything
        yield from attention(1, 70, share=0.0, dtype=dtype)
        yield from attention(70, 70, share=1.0, causal=True, dtype=dtype)
        yield from glu((5, 7), 19, dtype)
        yield from glu((1, 1), 4, dtype)
        yield from routing(tokens=67, dtype=dtype)
        yield from routing(tokens=1, dtype=dtype)
        yield from routing(tokens=1, heads=8, shared=0, active=4, groups=2, hidden=33, dtype=dtype)
    yield from projections()
    yield from projections(rows=1, heads=5, dim=64, hidden=33, bias=False, gated=False)
    yield from aggregated((7, 9), (2, 3), 3)
    yield from aggregated((3, 5), (1, 1), 5, dim=32, gated=False)


if __name__ == "__main__":
    torch.manual_seed(0)
    every = list(cases())
    Path(sys.argv[1]).write_bytes(integers(len(every)) + b"".join(every))
