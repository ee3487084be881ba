"""Projections of selected heads: every engine computes what the masked mathematics computes, with its gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mixhead.errors import MixheadError
from mixhead.ops import (
    PROJECTIONS,
    cpu,
    explain_projection,
    project_from_heads,
    project_to_heads,
    weight_by_head,
)
from mixhead.ops.cpu import projections as kernel

BUILT, WHY_NOT = cpu.available("projections")
needs_kernel = pytest.mark.skipif(not BUILT, reason=WHY_NOT)
ENGINES = [name for name in PROJECTIONS if name != "reference"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}

SELECTIONS = {
    "random": lambda *sizes: torch.rand(sizes) < 0.6,
    "everything": lambda *sizes: torch.ones(sizes, dtype=torch.bool),
    "nothing": lambda *sizes: torch.zeros(sizes, dtype=torch.bool),
    "skewed": lambda *sizes: torch.rand(sizes) < 0.5 ** torch.arange(sizes[-1]),
    "a head nobody selects": lambda *sizes: (torch.rand(sizes) < 0.6) & (torch.arange(sizes[-1]) != 1),
    "a token that selects nothing": lambda *sizes: (torch.rand(sizes) < 0.6) & (torch.arange(sizes[1]) != 0)[:, None],
}


def make(tokens=63, *, batch=2, heads=3, head_dim=16, size=48, selection="random", dtype=torch.float32, linear=True):
    """Rows and weights (of an `nn.Linear` or of experts) for both directions, and a selection."""

    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()

    weight = leaf(heads * head_dim, size) if linear else leaf(heads, head_dim, size)
    weight_out = leaf(size, heads * head_dim) if linear else leaf(heads, head_dim, size)
    return {
        "hidden": leaf(batch, tokens, size),
        "out": leaf(batch, tokens, heads, head_dim).transpose(1, 2).detach().requires_grad_(),
        "weight": weight,
        "weight_out": weight_out,
        "bias": leaf(heads, head_dim),
        "bias_out": leaf(size),
        "gates": leaf(batch, tokens, heads),
        "selected": SELECTIONS[selection](batch, tokens, heads),
        "heads": heads,
        "linear": linear,
    }


def to_heads(case, impl, bias=True):
    """Queries and the gradients of hidden states, weights and biases."""
    weight = case["weight"].unflatten(0, (case["heads"], -1)) if case["linear"] else case["weight"]
    q = project_to_heads(case["hidden"], weight, case["bias"] if bias else None, case["selected"], impl=impl)
    names = ["hidden", "weight", *(["bias"] if bias else [])]
    return outcome(q, case, names)


def from_heads(case, impl, bias=True, gated=True):
    """Rows and the gradients of the heads' outputs, weights, bias and gates."""
    weight = weight_by_head(case["weight_out"], case["heads"]) if case["linear"] else case["weight_out"]
    y = project_from_heads(
        case["out"],
        weight,
        case["bias_out"] if bias else None,
        case["selected"],
        case["gates"] if gated else None,
        impl=impl,
    )
    names = ["out", "weight_out", *(["bias_out"] if bias else []), *(["gates"] if gated else [])]
    return outcome(y, case, names)


def outcome(result, case, names):
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.dtype)
    gradients = torch.autograd.grad(result, [case[name] for name in names], cotangent)
    return {"result": result.detach(), **dict(zip(names, gradients, strict=True))}


def in_double(case):
    return {
        k: v.detach().double().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in case.items()
    }


WHOLE = ((to_heads, {}), (from_heads, {}))
PARTS = ((to_heads, {"bias": False}), (from_heads, {"bias": False}), (from_heads, {"gated": False}))


def assert_agrees(case, impl, calls=WHOLE):
    """Every tensor is the reference's in float64, and has the shape and dtype that it should have."""
    for direction, kwargs in calls:
        expected, actual = direction(in_double(case), "reference", **kwargs), direction(case, impl, **kwargs)
        for name, right in expected.items():
            ours = actual[name]
            assert ours.shape == right.shape
            assert ours.dtype == case["hidden"].dtype
            error = (ours.double() - right).abs().max().item() if right.numel() else 0.0
            most = max(1.0, right.abs().max().item()) if right.numel() else 1.0
            assert error <= TOLERANCE[ours.dtype] * most, f"{impl}, {direction.__name__}, {name}: {error}"
    q = to_heads(case, impl)["result"]
    assert (q.transpose(1, 2)[~case["selected"]] == 0).all()


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_selections(impl, selection):
    assert_agrees(make(selection=selection), impl)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(impl, dtype):
    if impl == "cpu" and kernel.refusal(torch.zeros(1, dtype=dtype)):
        with pytest.raises(MixheadError, match=r"impl='cpu' cannot take these arguments: .* in "):
            to_heads(make(dtype=dtype), impl)
        return
    assert_agrees(make(selection="skewed", dtype=dtype), impl)


@pytest.mark.parametrize("impl", ENGINES)
def test_without_a_bias_or_gates(impl):
    assert_agrees(make(), impl, PARTS)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("tokens", [1, 197, 1000])
def test_numbers_of_tokens(impl, tokens):
    assert_agrees(make(tokens, selection="skewed"), impl)


@needs_kernel
@pytest.mark.parametrize(("head_dim", "size"), [(1, 5), (8, 40), (33, 70), (64, 300), (80, 129), (300, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths(head_dim, size, dtype):
    """Of heads and of hidden states: below, at and beyond the vectors, panels and blocks of the kernel."""
    assert_agrees(make(70, head_dim=head_dim, size=size, dtype=dtype), "cpu")


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_with_weights_of_their_own(impl, dtype):
    """2 of 8 for every token, as in MoA and JetMoE."""
    case = make(100, heads=8, head_dim=64, size=96, dtype=dtype, linear=False)
    chosen = torch.rand(2, 100, 8).topk(2).indices
    case["selected"] = torch.zeros(2, 100, 8, dtype=torch.bool).scatter(-1, chosen, True)
    assert_agrees(case, impl)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("empty", [{"tokens": 0}, {"batch": 0}])
def test_nothing_to_project(impl, empty):
    case = make(**{"tokens": 5, "linear": False, **empty})
    assert_agrees(case, impl)


@pytest.mark.parametrize("impl", ENGINES)
def test_layouts(impl):
    """Tensors that are slices, expanded or transposed."""
    case = make()
    for name in ("hidden", "out", "weight", "weight_out"):
        case[name] = case[name].detach().mT.contiguous().mT.requires_grad_()
    case["gates"] = case["gates"].detach()[:, :1].expand(-1, 63, -1).requires_grad_()
    case["selected"] = case["selected"][:1].expand(2, -1, -1)
    assert_agrees(case, impl)


@pytest.mark.parametrize("impl", ENGINES)
def test_a_head_nobody_selects_learns_nothing(impl):
    case = make(selection="a head nobody selects", linear=False)
    assert (to_heads(case, impl)["weight"][1] == 0).all()
    assert (to_heads(case, impl)["bias"][1] == 0).all()
    assert (from_heads(case, impl)["weight_out"][1] == 0).all()
    assert (from_heads(case, impl)["gates"][~case["selected"]] == 0).all()


@pytest.mark.parametrize("impl", ENGINES)
def test_rows_that_are_not_selected_are_not_read(impl):
    case = make()
    clean = from_heads(case, impl)["result"]
    with torch.no_grad():
        case["out"][~case["selected"].transpose(1, 2)] = torch.nan
        case["gates"][~case["selected"]] = torch.nan
    assert torch.equal(from_heads(case, impl)["result"], clean)


def test_dense_is_the_linear_layer():
    case = make(selection="everything")
    linear = F.linear(case["hidden"], case["weight"], case["bias"].flatten())
    torch.testing.assert_close(to_heads(case, "dense")["result"], linear.unflatten(-1, (3, -1)).transpose(1, 2))
    rows = case["out"].transpose(1, 2).flatten(2)
    linear = F.linear(rows, case["weight_out"], case["bias_out"])
    torch.testing.assert_close(from_heads(case, "dense", gated=False)["result"], linear)


@pytest.mark.parametrize("impl", ["reference", "dense", "gathered"])
def test_derivatives_of_the_portable_engines(impl):
    case = make(5, head_dim=2, size=3, dtype=torch.float64, linear=False)

    def to(hidden, weight, bias):
        return project_to_heads(hidden, weight, bias, case["selected"], impl=impl)

    def back(out, weight, bias, gates):
        return project_from_heads(out, weight, bias, case["selected"], gates, impl=impl)

    torch.autograd.gradcheck(to, (case["hidden"], case["weight"], case["bias"]))
    torch.autograd.gradcheck(back, (case["out"], case["weight_out"], case["bias_out"], case["gates"]))
    torch.autograd.gradgradcheck(back, (case["out"], case["weight_out"], case["bias_out"], case["gates"]))


@pytest.mark.parametrize("impl", ["auto", *ENGINES])
def test_autocast(impl):
    case = make()
    with torch.autocast("cpu", torch.bfloat16):
        q, y = to_heads(case, impl), from_heads(case, impl)
    assert q["result"].dtype == y["result"].dtype == torch.bfloat16
    for actual, expected in ((q, to_heads(case, "reference")), (y, from_heads(case, "reference"))):
        for name, right in expected.items():
            assert name == "result" or actual[name].dtype == torch.float32
            assert (actual[name] - right).abs().max() <= 3e-2 * right.abs().max()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_deterministic_whatever_the_threads(dtype):
    case, before, results = make(1500, selection="skewed", size=300, dtype=dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            results.append([*to_heads(case, "cpu").values(), *from_heads(case, "cpu").values()])
    finally:
        torch.set_num_threads(before)
    names = [*to_heads(case, "cpu"), *from_heads(case, "cpu")]
    for other in results[1:]:
        for name, a, b in zip(names, other, results[0], strict=True):
            assert name == "bias_out" or torch.equal(a, b)  # that one is a sum of PyTorch's


@needs_kernel
def test_operator_checks():
    case = make(9, head_dim=4, size=5, linear=False)
    to, back = torch.ops.mixhead.project_to_heads_cpu.default, torch.ops.mixhead.project_from_heads_cpu.default
    for bias in (case["bias"], None):
        torch.library.opcheck(to, (case["hidden"], case["weight"], bias, case["selected"]), atol=1e-3, rtol=1e-2)
    for bias, gates in ((case["bias_out"], case["gates"].detach().float().requires_grad_()), (None, None)):
        args = (case["out"], case["weight_out"], bias, case["selected"], gates)
        torch.library.opcheck(back, args, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("impl", ["auto", "dense", pytest.param("cpu", marks=needs_kernel)])
def test_torch_compile_without_graph_breaks(impl):
    case = make(600)

    def both(hidden, weight, weight_out, gates):
        q = project_to_heads(hidden, weight.unflatten(0, (3, -1)), None, case["selected"], impl=impl)
        return project_from_heads(q, weight_by_head(weight_out, 3), None, case["selected"], gates, impl=impl)

    leaves = [case[name] for name in ("hidden", "weight", "weight_out", "gates")]
    expected = both(*leaves)
    actual = torch.compile(both, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    pairs = zip(*(torch.autograd.grad(y.square().mean(), leaves) for y in (actual, expected)), strict=True)
    for a, e in pairs:
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-2)


@needs_kernel
def test_a_second_derivative_is_refused():
    case = make(9)
    q = project_to_heads(case["hidden"], case["weight"].unflatten(0, (3, -1)), None, case["selected"], impl="cpu")
    (gradient,) = torch.autograd.grad(q.sum(), case["hidden"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        gradient.sum().backward()


def choice(tokens, heads, head_dim, share, dtype=torch.float32):
    hidden, weight = torch.zeros(1, tokens, 256, dtype=dtype), torch.zeros(heads, head_dim, 256, dtype=dtype)
    selected = torch.zeros(1, tokens, heads, dtype=torch.bool)
    selected[..., : round(share * heads)] = True
    return explain_projection(hidden, weight, selected)


def test_auto_skips_heads_where_that_pays():
    assert choice(1024, 16, 64, 1.0).impl == "dense"
    assert choice(1024, 16, 64, 0.75).impl == "dense"
    assert choice(32, 16, 64, 0.25).impl == "dense"
    assert choice(1024, 32, 32, 0.25).impl == "dense"
    assert choice(1024, 8, 2048, 0.25).impl == "gathered"
    assert choice(1024, 8, 2048, 0.75).impl == "dense"
    assert "75%" in choice(1024, 16, 64, 0.75).reason
    assert choice(1024, 16, 64, 0.25, torch.bfloat16).impl == "dense"
    if BUILT:
        assert choice(1024, 16, 64, 0.25).impl == "cpu"
        with torch.autocast("cpu", torch.bfloat16):
            assert choice(1024, 16, 64, 0.25).impl == "dense"


def test_auto_does_not_wait_for_another_device():
    hidden, weight = torch.zeros(1, 9, 8, device="meta"), torch.zeros(2, 4, 8, device="meta")
    selected = torch.zeros(1, 9, 2, dtype=torch.bool, device="meta")
    assert explain_projection(hidden, weight, selected).impl == "dense"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": (3, 4)}, "weight_HDC must be"),
        ({"selected": (2, 5, 4)}, "selected_BNH must be"),
        ({"hidden": (2, 5, 9)}, "hidden_BNC must be"),
        ({"bias": (12,)}, "bias_HD must be"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    shapes = {"hidden": (2, 5, 8), "weight": (3, 4, 8), "bias": (3, 4), "selected": (2, 5, 3), **change}
    hidden, weight, bias, selected = (torch.zeros(shape) for shape in shapes.values())
    with pytest.raises(MixheadError, match=message):
        project_to_heads(hidden, weight, bias, selected.bool())


def test_other_refusals():
    case = make(5)
    weight = case["weight"].unflatten(0, (3, -1))
    with pytest.raises(MixheadError, match=r"torch\.bool"):
        project_to_heads(case["hidden"], weight, None, case["selected"].float())
    with pytest.raises(MixheadError, match="one dtype"):
        project_to_heads(case["hidden"].double(), weight, None, case["selected"])
    with pytest.raises(MixheadError, match="'auto' or one of"):
        project_to_heads(case["hidden"], weight, None, case["selected"], impl="fast")
    with pytest.raises(MixheadError, match="out_BHND must be"):
        project_from_heads(case["out"].mT, weight, None, case["selected"])
    with pytest.raises(MixheadError, match="gates_BNH must be"):
        project_from_heads(case["out"], weight, None, case["selected"], case["gates"][:1])


def test_weight_by_head_is_the_weight():
    proj = nn.Linear(12, 5)
    weight_HDC = weight_by_head(proj.weight, 3)
    assert weight_HDC.data_ptr() == proj.weight.data_ptr()
    assert torch.equal(weight_HDC[1], proj.weight[:, 4:8].T)
