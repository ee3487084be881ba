"""Projections of chosen experts: every engine computes what the masked mathematics computes, with its gradients."""

import pytest
import torch

from mixhead.errors import MixheadError
from mixhead.ops import SLOT_PROJECTIONS, cpu, explain_slot_projection, project_from_slots, project_to_slots
from mixhead.ops.cpu import projections as kernel

BUILT, WHY_NOT = cpu.available("projections")
needs_kernel = pytest.mark.skipif(not BUILT, reason=WHY_NOT)
ENGINES = [name for name in SLOT_PROJECTIONS if name != "reference"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}

# [batch, tokens, slots] -> the expert of each slot, out of five.
CHOICES = {
    "random": lambda *sizes: torch.rand(*sizes[:2], 5).topk(sizes[2]).indices,
    "skewed": lambda *sizes: (torch.rand(*sizes[:2], 5) - torch.arange(5)).topk(sizes[2]).indices,
    "an expert nobody chooses": lambda *sizes: torch.rand(*sizes[:2], 4).topk(sizes[2]).indices + 1,
    "padding": lambda *sizes: (
        torch.rand(*sizes[:2], 5).topk(sizes[2]).indices.masked_fill((torch.arange(sizes[1]) % 3 == 0)[:, None], 5)
    ),
    "nothing but padding": lambda *sizes: torch.full(sizes, 5),
}


def make(tokens=63, *, batch=2, slots=2, width=16, size=48, choice="random", dtype=torch.float32, transposed=True):
    """Rows and weights for both directions, and a choice."""

    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()

    def weight():
        return leaf(5, size, width).mT if transposed else leaf(5, width, size)

    return {
        "hidden": leaf(batch, tokens, size),
        "out": leaf(batch, tokens, slots, width),
        "weight": weight().detach().requires_grad_(),
        "weight_out": weight().detach().requires_grad_(),
        "gates": leaf(batch, tokens, slots),
        "expert": CHOICES[choice](batch, tokens, slots),
    }


def to_slots(case, impl):
    """The slots, and the gradients of hidden states and weights."""
    slots = project_to_slots(case["hidden"], case["weight"], case["expert"], impl=impl)
    return outcome(slots, case, ["hidden", "weight"])


def from_slots(case, impl, gated=True):
    """Rows, and the gradients of the slots, the weights and the gates."""
    gates = case["gates"] if gated else None
    rows = project_from_slots(case["out"], case["weight_out"], case["expert"], gates, impl=impl)
    return outcome(rows, case, ["out", "weight_out", *(["gates"] if gated else [])])


def outcome(result, case, names):
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, [case[name] for name in names], grad)]


def assert_same(actual, expected, dtype):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert a.shape == e.shape
        scale = e.abs().max().clamp_min(1e-6).item()
        torch.testing.assert_close(a.to(e.dtype), e, rtol=0, atol=TOLERANCE[dtype] * scale)


def in_double(case):
    double = {k: v.detach().double() if v.is_floating_point() else v for k, v in case.items()}
    return {k: v.requires_grad_() if v.is_floating_point() else v for k, v in double.items()}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("impl", ENGINES)
def test_engines_agree_with_the_reference(impl, choice, dtype):
    case = make(choice=choice, dtype=dtype)
    if impl == "cpu" and kernel.refusal(case["hidden"]):
        with pytest.raises(MixheadError, match=r"impl='cpu' cannot take these arguments: .* in "):
            to_slots(case, impl)
        return
    assert_same(to_slots(case, impl), to_slots(in_double(case), "reference"), dtype)
    assert_same(from_slots(case, impl), from_slots(in_double(case), "reference"), dtype)
    assert_same(from_slots(case, impl, gated=False), from_slots(in_double(case), "reference", gated=False), dtype)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1},
        {"tokens": 1000, "batch": 1},
        {"width": 1, "size": 1},
        {"width": 7, "size": 13},
        {"width": 128, "size": 300, "slots": 3},
        {"slots": 1},
        {"slots": 5},
        {"transposed": False},
        {"width": 256, "size": 257, "transposed": False},
    ],
    ids=str,
)
def test_sizes_and_layouts(impl, sizes):
    case = make(**sizes)
    assert_same(to_slots(case, impl), to_slots(in_double(case), "reference"), torch.float32)
    assert_same(from_slots(case, impl), from_slots(in_double(case), "reference"), torch.float32)


@pytest.mark.parametrize("impl", SLOT_PROJECTIONS)
def test_each_slot_holds_what_its_expert_makes(impl):
    case = make(tokens=3, dtype=torch.float64 if impl != "cpu" else torch.float32)
    slots = project_to_slots(case["hidden"], case["weight"], case["expert"], impl=impl)
    for b, n, s in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(2)):
        expected = case["weight"][case["expert"][b, n, s]] @ case["hidden"][b, n]
        torch.testing.assert_close(slots[b, n, s], expected)


@pytest.mark.parametrize("impl", ["dense", "gathered"])
def test_gradcheck(impl):
    case = make(4, batch=1, width=3, size=5, choice="padding", dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w: project_to_slots(x, w, case["expert"], impl=impl), (case["hidden"], case["weight"])
    )
    assert torch.autograd.gradcheck(
        lambda x, w, g: project_from_slots(x, w, case["expert"], g, impl=impl),
        (case["out"], case["weight_out"], case["gates"]),
    )


@pytest.mark.parametrize("impl", SLOT_PROJECTIONS)
def test_what_stands_in_empty_slots_is_never_read(impl):
    case = make(choice="padding")
    empty = (case["expert"] == 5).unsqueeze(-1)
    dirty = {**case, "out": case["out"].detach().masked_fill(empty, torch.nan).requires_grad_()}
    rows, *_ = from_slots(dirty, impl, gated=False)
    torch.testing.assert_close(rows, from_slots(case, impl, gated=False)[0])


def test_autocast_computes_in_its_dtype():
    case = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        slots = project_to_slots(case["hidden"], case["weight"], case["expert"])
        rows = project_from_slots(slots, case["weight_out"], case["expert"], case["gates"])
    assert slots.dtype == rows.dtype == torch.bfloat16


def test_no_tokens():
    case = make(0)
    assert project_to_slots(case["hidden"], case["weight"], case["expert"]).shape == (2, 0, 2, 16)
    assert project_from_slots(case["out"], case["weight_out"], case["expert"]).shape == (2, 0, 48)


def test_auto_says_why():
    def choice(**sizes):
        case = make(**sizes)
        return explain_slot_projection(case["hidden"], case["weight"], case["expert"])

    assert choice(slots=5).impl == "dense"
    assert "every expert" in choice(slots=5).reason
    assert choice(dtype=torch.float64).impl == choice(dtype=torch.bfloat16).impl == "gathered"
    assert choice().impl == ("cpu" if BUILT else "gathered")
    assert "2 of 5 experts" in choice().reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert": torch.zeros(2, 63, 6, dtype=torch.int64)}, "at most 5 slots"),
        ({"expert": torch.zeros(2, 63, 2, dtype=torch.int32)}, "expert_BNS must be torch.int64, got torch.int32"),
        ({"hidden": torch.zeros(2, 63, 47)}, r"hidden_BNC must be \[2, 63, 48\], got \[2, 63, 47\]"),
        ({"weight": torch.zeros(5, 16, 48).double()}, "must have one dtype"),
        ({"weight": torch.zeros(80, 48)}, r"weight_EDC must be \[experts, width, hidden_size\]"),
    ],
)
def test_mistakes_are_named(change, message):
    case = {**make(), **change}
    with pytest.raises(MixheadError, match=message):
        project_to_slots(case["hidden"], case["weight"], case["expert"])


def test_an_unknown_engine_is_answered_with_the_known_ones():
    case = make()
    with pytest.raises(MixheadError, match="impl='fast' is unknown: choose 'auto' or one of reference"):
        project_to_slots(case["hidden"], case["weight"], case["expert"], impl="fast")


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_deterministic_whatever_the_threads(dtype):
    case, before, results = make(1500, choice="skewed", size=300, dtype=dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            results.append([*to_slots(case, "cpu"), *from_slots(case, "cpu")])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(other, results[0], strict=True))


@needs_kernel
def test_operator_checks():
    case = make(9, width=4, size=5, choice="padding")
    to, back = torch.ops.mixhead.project_to_heads_cpu.default, torch.ops.mixhead.project_from_heads_cpu.default
    torch.library.opcheck(to, (case["hidden"], case["weight"], None, case["expert"]), atol=1e-3, rtol=1e-2)
    out = case["out"].transpose(1, 2).detach().requires_grad_()
    for gates in (case["gates"], None):
        args = (out, case["weight_out"], None, case["expert"], gates)
        torch.library.opcheck(back, args, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("impl", ["auto", "dense", pytest.param("cpu", marks=needs_kernel)])
def test_torch_compile_without_graph_breaks(impl):
    case = make(100)

    def both(hidden, weight, weight_out, gates):
        slots = project_to_slots(hidden, weight, case["expert"], impl=impl)
        return project_from_slots(slots, weight_out, case["expert"], gates, impl=impl)

    leaves = [case[name] for name in ("hidden", "weight", "weight_out", "gates")]
    outcomes = []
    for run in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        rows = run(*leaves)
        outcomes.append([rows, *torch.autograd.grad(rows.square().mean(), leaves)])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3 * a.abs().max().item())


@needs_kernel
def test_experts_that_do_not_exist_are_empty_slots():
    case = make(choice="padding")
    strange = torch.where(case["expert"] == 5, torch.tensor([-1, 1 << 40]), case["expert"])
    expected = to_slots(case, "cpu") + from_slots(case, "cpu")
    actual = to_slots({**case, "expert": strange}, "cpu") + from_slots({**case, "expert": strange}, "cpu")
    assert all(a.equal(b) for a, b in zip(actual, expected, strict=True))
