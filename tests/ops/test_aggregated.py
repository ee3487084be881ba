"""Aggregated attention: every implementation computes what the unfolded form computes, output and gradients."""

import math
from dataclasses import replace

import pytest
import torch

from mixhead import Routing
from mixhead.errors import MixheadError
from mixhead.ops import AGGREGATED_IMPLEMENTATIONS, RelativeBias, cpu, explain_aggregated
from mixhead.ops import aggregated_attention as operator
from mixhead.ops.aggregated.cpu import MAX_HEAD_DIM

FAST = [name for name in AGGREGATED_IMPLEMENTATIONS if name != "reference"]


def aggregated_attention(*args, pool_bias, size, **kwargs):
    """The operator with the table of `pool_bias` alone: which entry belongs to which pair is made up here."""
    generator = torch.Generator().manual_seed(1)
    pooled = (args[3] if args else kwargs["k_BHTD"]).shape[-2]
    keys = next(u for u in range(math.isqrt(pooled), 0, -1) if pooled % u == 0)
    row_YU = torch.randint(pool_bias.shape[1], (size[0], keys), generator=generator)
    column_XV = torch.randint(pool_bias.shape[2], (size[1], pooled // keys), generator=generator)
    return operator(*args, pool_bias=RelativeBias(pool_bias, row_YU, column_XV), size=size, **kwargs)


def inputs(size=(7, 9), heads=3, dim=24, pooled=6, batch=2, window=3, dtype=torch.float32, requires_grad=False):
    """Random arguments by name."""
    tokens = size[0] * size[1]
    shapes = {
        "q_BHND": (batch, heads, tokens, dim),
        "k_BHND": (batch, heads, tokens, dim),
        "v_BHND": (batch, heads, tokens, dim),
        "k_BHTD": (batch, heads, pooled, dim),
        "v_BHTD": (batch, heads, pooled, dim),
        "query_embedding_HD": (heads, dim),
        "temperature_H": (heads,),
        "local_bias_HL": (heads, window**2),
        "learnable_tokens_HDL": (heads, dim, window**2),
        "learnable_bias_HL": (heads, window**2),
    }
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    tensors["pool_bias"] = torch.randn(heads, 5, 4, dtype=torch.float64)
    tensors["temperature_H"] = tensors["temperature_H"].exp()
    return {name: t.to(dtype).requires_grad_(requires_grad) for name, t in tensors.items()}


def routing_of(kind, batch, tokens, heads, dtype=torch.float32):
    """Gates as a leaf, so that their gradient can be looked at."""
    selected = {
        "random": torch.rand(batch, tokens, heads) < 0.6,
        # one head for nearly all tokens, the last one for none
        "skewed": torch.rand(batch, tokens, heads) < torch.linspace(0.95, 0.0, heads),
        "nothing": torch.zeros(batch, tokens, heads).bool(),
    }[kind]
    gates = (torch.rand(batch, tokens, heads, dtype=dtype) + 0.5) * selected
    return Routing(gates.requires_grad_(), selected)


def results(arguments, routing, size, impl, grad):
    """Output, and the gradients of everything that has one."""
    tensors = [t for t in (*arguments.values(), routing.gates_BNH if routing else None) if t is not None]
    for tensor in tensors:
        tensor.grad = None
    out = aggregated_attention(**arguments, routing=routing, size=size, impl=impl)
    out.backward(grad)
    # The gradient of a gate is defined where its head is selected.
    names = [*arguments, *(["gates"] if routing else [])]
    found = {name: t.grad.clone() for name, t in zip(names, tensors, strict=True)}
    if routing:
        found["gates"] = found["gates"] * routing.selected_BNH
    return out.detach(), found


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("kind", ["random", "skewed", "nothing", None])
@pytest.mark.parametrize(
    ("size", "pooled", "window"),
    [((7, 9), 6, 3), ((1, 1), 1, 3), ((14, 14), 49, 3), ((3, 21), 1, 5), ((9, 1), 2, 1)],
)
def test_outputs_and_gradients(impl, kind, size, pooled, window):
    arguments = inputs(size, pooled=pooled, window=window, requires_grad=True)
    routing = routing_of(kind, 2, math.prod(size), 3) if kind else None
    grad = torch.randn(2, 3, math.prod(size), 24)
    out, gradients = results(arguments, routing, size, impl, grad)
    expected_out, expected = results(arguments, routing, size, "reference", grad)
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=2e-5)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max()) + 1.0
        torch.testing.assert_close(
            gradients[name], gradient, rtol=0, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    if routing:
        assert not out[~routing.selected_BNH.transpose(1, 2)].any()


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize(("heads", "dim"), [(1, 6), (4, 12), (2, 33), (5, 64)])
def test_other_widths(impl, heads, dim):
    arguments = inputs((5, 6), heads=heads, dim=dim, requires_grad=True)
    routing = routing_of("random", 2, 30, heads)
    grad = torch.randn(2, heads, 30, dim)
    if impl == "cpu" and dim > MAX_HEAD_DIM[cpu.best_level()]:
        with pytest.raises(MixheadError, match="wider than the kernel takes"):
            results(arguments, routing, (5, 6), impl, grad)
        return
    out, gradients = results(arguments, routing, (5, 6), impl, grad)
    expected_out, expected = results(arguments, routing, (5, 6), "reference", grad)
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=2e-5)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max()) + 1.0
        torch.testing.assert_close(
            gradients[name], gradient, rtol=0, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("impl", AGGREGATED_IMPLEMENTATIONS)
def test_layouts_of_projections(impl):
    """Heads cut out of one projection, as the model hands them over, and an expanded gradient."""
    a = inputs((5, 6), batch=2, heads=3, dim=8)
    joined = torch.randn(2, 30, 48)
    k, v = joined.unflatten(-1, (-1, 8)).transpose(1, 2).chunk(2, dim=1)
    q = torch.randn(2, 30, 24).unflatten(-1, (-1, 8)).transpose(1, 2)
    strided = {**a, "q_BHND": q, "k_BHND": k, "v_BHND": v}
    packed = {name: t.contiguous() for name, t in strided.items()}
    torch.testing.assert_close(
        aggregated_attention(**strided, routing=None, size=(5, 6), impl=impl),
        aggregated_attention(**packed, routing=None, size=(5, 6), impl=impl),
    )
    leaf = q.detach().requires_grad_()
    aggregated_attention(**{**strided, "q_BHND": leaf}, routing=None, size=(5, 6), impl=impl).sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("impl", AGGREGATED_IMPLEMENTATIONS)
def test_bfloat16_stays_close_to_double(impl):
    exact = inputs((6, 7), dtype=torch.float64)
    half = {name: t.bfloat16() for name, t in exact.items()}
    expected = aggregated_attention(**exact, routing=None, size=(6, 7), impl="reference")
    out = aggregated_attention(**half, routing=None, size=(6, 7), impl=impl)
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("impl", ["reference", "portable"])
def test_gradients_in_double_precision(impl):
    arguments = inputs((2, 3), heads=2, dim=3, pooled=2, batch=1, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(1, 6, 2, dtype=torch.float64).add(0.5).requires_grad_()
    selected = torch.ones(1, 6, 2, dtype=torch.bool)

    def function(gates, *tensors):
        routing = Routing(gates, selected)
        return aggregated_attention(
            **dict(zip(arguments, tensors, strict=True)), routing=routing, size=(2, 3), impl=impl
        )

    assert torch.autograd.gradcheck(function, (gates, *arguments.values()), fast_mode=True)


def test_a_window_in_a_corner_by_hand():
    """One head of width 1: unit vectors are signs, so that every number can be followed."""
    q = torch.tensor([2.0, -3.0]).view(1, 1, 2, 1)
    k = torch.tensor([5.0, -1.0]).view(1, 1, 2, 1)
    v = torch.tensor([10.0, 20.0]).view(1, 1, 2, 1)
    out = operator(
        q, k, v, torch.tensor(-4.0).view(1, 1, 1, 1), torch.tensor(40.0).view(1, 1, 1, 1), None,
        size=(1, 2),
        query_embedding_HD=torch.tensor([[0.5]]),
        temperature_H=torch.tensor([2.0]),
        local_bias_HL=torch.arange(9.0).view(1, 9) / 10,
        pool_bias=RelativeBias(torch.tensor([[[0.7, 0.3]]]), torch.tensor([[0]]), torch.tensor([[1], [0]])),
        learnable_tokens_HDL=torch.arange(9.0).view(1, 1, 9),
        learnable_bias_HL=torch.full((1, 9), 0.25),
        impl="reference",
    )  # fmt: skip
    # The first token sees itself (place 4 of its window), its neighbour (place 5) and the pooled key: 3 keys.
    s = 1.5 * 2 * math.log(3)
    w = torch.tensor([s + 0.4, -s + 0.5, -s + 0.3]).softmax(0)
    first = (w[0] + 4.25) * 10 + (w[1] + 5.25) * 20 + w[2] * 40
    torch.testing.assert_close(out[0, 0, 0, 0], first)
    s = -0.5 * 2 * math.log(3)  # the second one: its neighbour is at place 3
    w = torch.tensor([s + 0.3, -s + 0.4, -s + 0.7]).softmax(0)
    second = (w[0] - 3 + 0.25) * 10 + (w[1] - 4 + 0.25) * 20 + w[2] * 40
    torch.testing.assert_close(out[0, 0, 1, 0], second)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"size": (5, 5)}, r"size=\(5, 5\) has not as many places as there are queries, 63"),
        ({"k_BHND": torch.zeros(2, 3, 62, 24)}, r"k_BHND must be \[2, 3, 63, 24\], got \[2, 3, 62, 24\]"),
        ({"local_bias_HL": torch.zeros(3, 4)}, "4 window positions, but that must be 1, 9, 25"),
        ({"q_BHND": torch.zeros(3, 63, 24)}, "must have 4 dimensions"),
        ({"routing": Routing.from_gates(torch.ones(2, 63, 4))}, r"gates_BNH must be \[2, 63, 3\]"),
        ({"pool_bias": torch.zeros(2, 5, 4)}, r"table of pool_bias must be \[3, R, S\], got \[2, 5, 4\]"),
        ({"impl": "unfolded"}, "impl='unfolded' is unknown: choose 'auto' or one of reference"),
    ],
)
def test_arguments_that_do_not_fit(change, sentence):
    with pytest.raises(MixheadError, match=sentence):
        aggregated_attention(**{**inputs(), "routing": None, "size": (7, 9), **change})


def test_indices_of_the_pool_bias_that_do_not_fit():
    arguments = inputs()
    table = arguments.pop("pool_bias")

    def call(rows, columns):
        bias = RelativeBias(table, torch.zeros(rows, dtype=torch.long), torch.zeros(columns, dtype=torch.long))
        return operator(**arguments, routing=None, size=(7, 9), pool_bias=bias)

    assert call((7, 2), (9, 3)).shape == (2, 3, 63, 24)
    with pytest.raises(MixheadError, match=r"must be \[7, U\] and \[9, V\], got \[9, 2\] and \[7, 3\]"):
        call((9, 2), (7, 3))
    with pytest.raises(MixheadError, match="pool_bias is for 2 x 2 pooled keys, but there are 6"):
        call((7, 2), (9, 2))


needs_kernel = pytest.mark.skipif(not cpu.available("aggregated")[0], reason=cpu.available("aggregated")[1])


@needs_kernel
def test_the_kernel_is_a_proper_operator():
    """Schema, fake tensors and autograd registration, with and without gates."""
    a = inputs((3, 4), heads=2, dim=6, pooled=2, requires_grad=True)
    index = torch.randint(5, (3, 2)), torch.randint(4, (4, 1))
    routing = routing_of("random", 2, 12, 2)
    for gates, selected in ((routing.gates_BNH, routing.selected_BNH), (None, None)):
        maps = [a[name] for name in ("q_BHND", "k_BHND", "v_BHND", "k_BHTD", "v_BHTD")]
        names = ("query_embedding_HD", "temperature_H", "local_bias_HL", "pool_bias")
        names += ("learnable_tokens_HDL", "learnable_bias_HL")
        torch.library.opcheck(
            torch.ops.mixhead.aggregate_cpu.default,
            (*maps, gates, selected, 3, *(a[name] for name in names), *index),
            atol=1e-4, rtol=1e-3,
        )  # fmt: skip


@needs_kernel
def test_the_kernel_takes_what_auto_gives_it(monkeypatch):
    """Single precision goes to the kernel; what it has no instructions or room for goes to portable PyTorch."""
    calls = []
    counted = replace(AGGREGATED_IMPLEMENTATIONS["cpu"], run=lambda a: calls.append(a) or a.v_BHND)
    monkeypatch.setitem(AGGREGATED_IMPLEMENTATIONS, "cpu", counted)
    aggregated_attention(**inputs(), routing=None, size=(7, 9))
    assert len(calls) == 1
    for arguments in (inputs(dtype=torch.float64), inputs(dim=65), inputs(window=9)):
        out = aggregated_attention(**arguments, routing=None, size=(7, 9))
        assert out.equal(aggregated_attention(**arguments, routing=None, size=(7, 9), impl="portable"))
    assert len(calls) == 1


@needs_kernel
@pytest.mark.parametrize(
    ("arguments", "window", "impl", "reason"),
    [
        ({}, 3, "cpu", "ran at 1.50 times the speed of plain PyTorch on all heads"),
        ({"dtype": torch.float64}, 3, "portable", "computes in float32, not in torch.float64; portable PyTorch"),
        ({"dim": 65}, 3, "portable", "wider than the kernel takes"),
        ({}, 9, "portable", "wider than the kernel takes"),
    ],
)
def test_what_auto_takes_is_explained(arguments, window, impl, reason):
    a = inputs(**arguments)
    choice = explain_aggregated(a["q_BHND"], a["k_BHTD"], window)
    assert choice.impl == impl
    assert reason in choice.reason


@needs_kernel
@pytest.mark.parametrize("share", [0.02, 1.0])
def test_rows_far_apart_and_next_to_each_other(share):
    """Rows of a head from all over a map of several blocks, or all of them."""
    arguments = inputs((23, 17), heads=2, pooled=4, requires_grad=True)
    selected = torch.rand(2, 391, 2) < share
    routing = Routing((torch.rand(2, 391, 2) * selected).requires_grad_(), selected)
    grad = torch.randn(2, 2, 391, 24)
    (out, found), (expected_out, expected) = (
        results(arguments, routing, (23, 17), impl, grad) for impl in ("cpu", "reference")
    )
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=2e-5)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max()) + 1.0
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


@needs_kernel
def test_gradients_do_not_depend_on_the_threads():
    arguments = inputs((9, 9), heads=3, batch=3, requires_grad=True)
    routing = routing_of("random", 3, 81, 3)
    grad, threads = torch.randn(3, 3, 81, 24), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        out, alone = results(arguments, routing, (9, 9), "cpu", grad)
        torch.set_num_threads(4)
        same_out, together = results(arguments, routing, (9, 9), "cpu", grad)
    finally:
        torch.set_num_threads(threads)
    assert out.equal(same_out)
    assert all(together[name].equal(gradient) for name, gradient in alone.items())


@needs_kernel
def test_the_kernel_copes_with_zeros_and_large_numbers():
    """Keys and queries of length 0 have no direction; scores of some hundreds overflow nothing."""
    a = inputs((4, 5), requires_grad=True)
    with torch.no_grad():
        a["q_BHND"][:, :, 0] = 0.0
        a["k_BHND"][:, :, 1] = 0.0
        a["k_BHTD"][:, :, 0] = 0.0
        a["temperature_H"] *= 100.0
    grad = torch.randn(2, 3, 20, 24)
    (out, gradients), (expected, wanted) = (results(a, None, (4, 5), impl, grad) for impl in ("cpu", "portable"))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for name in a:
        assert gradients[name].isfinite().all()
    # In the direction of a vector of length 0 the gradient is 1e12 times the others, so the rest is compared.
    for name in ("v_BHND", "v_BHTD", "learnable_tokens_HDL"):
        torch.testing.assert_close(gradients[name], wanted[name], rtol=1e-3, atol=1e-3)
