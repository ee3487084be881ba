"""What `head_attention` promises: the mathematics, what may not leak, what is refused, engine and memory."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from engines import engines

from mixhead.errors import MixheadError
from mixhead.ops import IMPLEMENTATIONS, explain, head_attention
from mixhead.routing import Routing

# Slots take only selections that are balanced over the groups: test_slots.py has them.
EVERY = ["auto", *engines("slots")]


def make_inputs(queries=6, keys=6, *, batch=2, heads=4, kv_heads=4, head_dim=8, dtype=torch.float32):
    """q, k, v and a routing in which each token uses about half of the heads."""
    q_BHND = torch.randn(batch, heads, queries, head_dim, dtype=dtype)
    k_BKTD, v_BKTD = (torch.randn(batch, kv_heads, keys, head_dim, dtype=dtype) for _ in range(2))
    selected_BNH = torch.rand(batch, queries, heads) < 0.5
    selected_BNH[0, 0, 0], selected_BNH[0, 0, 1] = True, False
    return q_BHND, k_BKTD, v_BKTD, Routing(selected_BNH * torch.rand(batch, queries, heads), selected_BNH)


@pytest.mark.parametrize("impl", EVERY)
def test_the_formula_head_by_head_and_token_by_token(impl):
    q, k, v, routing = make_inputs(5, 7, heads=6, kv_heads=2)
    out = head_attention(q, k, v, routing, impl=impl)
    for b in range(2):
        for h in range(6):
            for n in range(5):
                if not routing.selected_BNH[b, n, h]:
                    assert (out[b, h, n] == 0).all()
                    continue
                weights_T = (k[b, h // 3] @ q[b, h, n] / 8**0.5).softmax(-1)
                torch.testing.assert_close(out[b, h, n], routing.gates_BNH[b, n, h] * (weights_T @ v[b, h // 3]))


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("causal", [False, True])
def test_all_heads_with_gate_one_are_plain_attention(impl, causal):
    q, k, v, _ = make_inputs(9, 9)
    out = head_attention(q, k, v, Routing.from_gates(torch.ones(2, 9, 4)), causal=causal, impl=impl)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=causal))


@pytest.mark.parametrize("impl", EVERY)
def test_selection_rules_where_gate_and_selection_disagree(impl):
    q, k, v, _ = make_inputs()
    selected = torch.zeros(2, 6, 4, dtype=torch.bool)
    assert (head_attention(q, k, v, Routing(torch.ones(2, 6, 4), selected), impl=impl) == 0).all()
    assert (head_attention(q, k, v, Routing(torch.zeros(2, 6, 4), ~selected), impl=impl) == 0).all()


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("kwargs", [{}, {"causal": True}, {"attn_mask": torch.ones(6, 6, dtype=torch.bool)}], ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_selected_never_reaches_the_output(impl, kwargs, poison):
    q, k, v, routing = make_inputs()
    routing.selected_BNH[..., 2] = False  # nobody selects head 2
    clean = head_attention(q, k, v, routing, impl=impl, **kwargs)
    unused_BHN1 = ~routing.selected_BNH.transpose(1, 2).unsqueeze(-1)
    poisoned_gates = routing.gates_BNH.masked_fill(~routing.selected_BNH, poison)
    k[:, 2], v[:, 2] = poison, poison
    dirty = head_attention(
        q.masked_fill(unused_BHN1, poison), k, v, Routing(poisoned_gates, routing.selected_BNH), impl=impl, **kwargs
    )
    assert dirty.equal(clean)


@pytest.mark.parametrize("impl", ["auto", *engines("slots", "flex", "triton")])
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_not_selected_never_reaches_a_gradient(impl, causal):
    q, k, v, routing = make_inputs(head_dim=32)
    unused_BHN1 = ~routing.selected_BNH.transpose(1, 2).unsqueeze(-1)
    gradients = []
    for given in (q.masked_fill(unused_BHN1, 3.0), q.masked_fill(unused_BHN1, torch.nan)):
        leaves = [x.clone().requires_grad_() for x in (given, k, v, routing.gates_BNH)]
        out = head_attention(*leaves[:3], Routing(leaves[3], routing.selected_BNH), causal=causal, impl=impl)
        gradients.append(torch.autograd.grad(out.square().sum(), leaves))
    for clean, dirty in zip(*gradients, strict=True):
        assert dirty.isfinite().all()
        torch.testing.assert_close(dirty, clean)
    out = head_attention(given, k, v, Routing(leaves[3], routing.selected_BNH), causal=causal, impl=impl)
    assert torch.autograd.grad(out.sum(), leaves[3])[0].isfinite().all()  # of the gates alone


@pytest.mark.parametrize("impl", EVERY)
def test_nan_where_nobody_selects_anything(impl):
    q, k, v, _ = make_inputs()
    routing = Routing.from_gates(torch.zeros(2, 6, 4))
    assert (head_attention(q * torch.nan, k * torch.nan, v * torch.nan, routing, impl=impl) == 0).all()


@pytest.mark.parametrize("impl", EVERY)
def test_nan_in_a_selected_head_stays_visible_and_in_that_head(impl):
    # In a value: for a NaN in a query alone the stock CPU kernel itself returns 0.
    q, k, v, routing = make_inputs()
    v[0, 0, 3] = torch.nan
    nan_BHN = head_attention(q, k, v, routing, impl=impl).isnan().all(-1)
    assert nan_BHN[0, 0].equal(routing.selected_BNH[0, :, 0])
    assert nan_BHN.sum() == nan_BHN[0, 0].sum()


@pytest.mark.parametrize("impl", EVERY)
def test_inputs_are_not_changed_and_results_repeat(impl):
    q, k, v, routing = make_inputs(50, 50)
    mask = torch.rand(50, 50) < 0.8
    tensors = [q, k, v, routing.gates_BNH, routing.selected_BNH, mask]
    before = [t.clone() for t in tensors]
    first = head_attention(q, k, v, routing, attn_mask=mask, causal=True, impl=impl)
    second = head_attention(q, k, v, routing, attn_mask=mask, causal=True, impl=impl)
    assert first.equal(second)
    assert all(t.equal(b) for t, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("impl", ["auto", *engines("slots", "flex", "triton")])
def test_eight_threads_at_once(impl):
    # Slots need balanced selections, flex has no gradient on the CPU, and Triton's interpreter takes one thread.
    jobs = [(*make_inputs(40 + 3 * i, 40, kv_heads=2), i % 2 == 0) for i in range(16)]

    def run(job):
        q, k, v, routing, causal = job
        q = q.clone().requires_grad_()
        out = head_attention(q, k, v, routing, causal=causal, impl=impl)
        return out.detach(), torch.autograd.grad(out.square().sum(), q)[0]

    expected = [run(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        for results, wanted in zip(pool.map(run, jobs), expected, strict=True):
            for result, want in zip(results, wanted, strict=True):
                torch.testing.assert_close(result, want)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_the_queries_whatever_that_of_gates_and_mask(impl, dtype):
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels refuse float64, see test_triton.py")
    q, k, v, routing = make_inputs(dtype=dtype)
    if impl == "cpu" and dtype not in (torch.float32, torch.bfloat16):
        with pytest.raises(MixheadError, match="computes in float32 and bfloat16, not in"):
            head_attention(q, k, v, routing, impl=impl)
        return
    for mask_dtype in (torch.float64, torch.float32, torch.bfloat16):
        mask = torch.zeros(6, 6, dtype=mask_dtype)
        assert head_attention(q, k, v, routing, attn_mask=mask, impl=impl).dtype == dtype


def check_autocast(attend, impl):
    q, k, v, routing = make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        # A rotary embedding in float32 behind projections in bfloat16.
        out = attend(q, k, v.bfloat16(), routing, impl=impl)
        stock = F.scaled_dot_product_attention(q, k, v.bfloat16())
    assert out.dtype == stock.dtype == torch.bfloat16
    exact = head_attention(q, k, v, routing, impl="reference")
    torch.testing.assert_close(out.float(), exact, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("impl", EVERY)
def test_autocast_takes_mixed_dtypes_as_the_stock_kernel_does(impl):
    check_autocast(head_attention, impl)


def test_autocast_compiled():
    check_autocast(torch.compile(head_attention, fullgraph=True, backend="aot_eager"), "auto")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (6, 4, 8)}, r"q_BHND must have 4 dimensions \[batch, heads, tokens, head_dim\], got \[6, 4, 8\]\."),
        ({"k": (4, 6, 8)}, r"k_BKTD must have 4 dimensions"),
        ({"k": (2, 3, 6, 8)}, r"k_BKTD must be \[2, K, T, 8\] with K dividing the 4 query heads, got \[2, 3, 6, 8\]\."),
        ({"k": (2, 0, 6, 8)}, r"k_BKTD must be .* got \[2, 0, 6, 8\]"),
        ({"k": (1, 4, 6, 8)}, r"k_BKTD must be .* got \[1, 4, 6, 8\]"),
        ({"k": (2, 4, 6, 9)}, r"k_BKTD must be .* got \[2, 4, 6, 9\]"),
        ({"v": (2, 4, 5, 8)}, r"v_BKTD must have the shape of k_BKTD, \[2, 4, 6, 8\], got \[2, 4, 5, 8\]\."),
        ({"gates": (2, 4, 6)}, r"routing.gates_BNH must be \[2, 6, 4\], got \[2, 4, 6\]\."),
        ({"gates": (1, 6, 4)}, r"routing.gates_BNH must be \[2, 6, 4\], got \[1, 6, 4\]\."),
        ({"mask": (6, 7)}, r"attn_mask must broadcast to \[2, 4, 6, 6\], got \[6, 7\]\."),
        ({"mask": (2, 6)}, r"attn_mask must broadcast to"),
        ({"mask": (1, 2, 4, 6, 6)}, r"attn_mask must broadcast to"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_named(change, message):
    shapes = {"q": (2, 4, 6, 8), "k": (2, 4, 6, 8), "v": (2, 4, 6, 8), "gates": (2, 6, 4), "mask": (6, 6), **change}
    q, k, v, gates, mask = (torch.ones(shape) for shape in shapes.values())
    for impl in ("auto", *IMPLEMENTATIONS):
        with pytest.raises(MixheadError, match=message):
            head_attention(q, k, v, Routing.from_gates(gates), attn_mask=mask, impl=impl)


def test_dtypes_that_do_not_fit_are_named():
    q, k, v, routing = make_inputs()
    with pytest.raises(MixheadError, match=r"v_BKTD is torch.bfloat16, but q_BHND is torch.float32"):
        head_attention(q, k, v.bfloat16(), routing)
    # A tokenizer's mask of 0 and 1 added to the scores would be wrong in silence.
    with pytest.raises(MixheadError, match=r"attn_mask must be torch.bool .* or floating point .* got torch.int64"):
        head_attention(q, k, v, routing, attn_mask=torch.ones(2, 1, 1, 6, dtype=torch.long))
    with pytest.raises(MixheadError, match=r"routing.selected_BNH must be torch.bool, got torch.int64"):
        head_attention(q, k, v, Routing(routing.gates_BNH, routing.selected_BNH.long()))
    with pytest.raises(MixheadError, match=r"must be floating point, got torch.int64"):
        head_attention(q.long(), k.long(), v.long(), routing)


@pytest.mark.parametrize("name", ["k_BKTD", "v_BKTD", "routing.gates_BNH", "routing.selected_BNH", "attn_mask"])
def test_devices_that_do_not_fit_are_named(name):
    q, k, v, routing = make_inputs(head_dim=64)
    given = {"k_BKTD": k, "v_BKTD": v, "routing.gates_BNH": routing.gates_BNH}
    given |= {"routing.selected_BNH": routing.selected_BNH, "attn_mask": torch.ones(6, 6, dtype=torch.bool)}
    given[name] = given[name].to("meta")
    k, v, gates, selected, mask = given.values()
    with pytest.raises(MixheadError, match=f"{name} is on meta, but q_BHND is on cpu"):
        head_attention(q, k, v, Routing(gates, selected), attn_mask=mask if name == "attn_mask" else None)


def test_shapes_alone_can_be_asked_for():
    q, k, v, routing = make_inputs(head_dim=64)
    q, k, v, gates, selected = (x.to("meta") for x in (q, k, v, routing.gates_BNH, routing.selected_BNH))
    assert head_attention(q, k, v, Routing(gates, selected)).shape == q.shape


@pytest.mark.parametrize("routing", [None, torch.ones(2, 6, 4)])
def test_what_is_no_routing_is_refused(routing):
    q, k, v, _ = make_inputs(head_dim=64)
    with pytest.raises(MixheadError, match=r"routing must be a mixhead.Routing, got"):
        head_attention(q, k, v, routing)


# --- functions of functions -------------------------------------------------------------------------------------------


def test_forward_mode_derivatives_are_those_of_the_formula():
    """The C++ kernel has no tangents; had it run, they would be zero in silence."""
    q, k, v, routing = make_inputs(head_dim=64)
    given = (q, k, v, routing.gates_BNH)
    tangents = tuple(torch.randn_like(x) for x in given)

    def by(impl):
        return lambda q, k, v, gates: head_attention(q, k, v, Routing(gates, routing.selected_BNH), impl=impl)

    _, actual = torch.func.jvp(by("auto"), given, tangents)
    _, expected = torch.func.jvp(by("reference"), given, tangents)
    step = 1e-6
    above, below = (
        by("reference")(*(x.double() + way * step * t.double() for x, t in zip(given, tangents, strict=True)))
        for way in (1, -1)
    )
    assert actual.abs().max() > 0.1
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual.double(), (above - below) / (2 * step), rtol=1e-4, atol=1e-4)


def test_gradients_by_torch_func_alone_and_for_many():
    q, k, v, routing = make_inputs(head_dim=64)

    def loss(q):
        return head_attention(q, k, v, routing).square().sum()

    many = torch.stack([q, q + 1.0])
    gradients = torch.func.vmap(torch.func.grad(loss))(many)
    for one, gradient in zip(many, gradients, strict=True):
        leaf = one.clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf), leaf)[0], rtol=1e-4, atol=1e-5)


def test_an_unknown_implementation_is_answered_with_the_known_ones():
    with pytest.raises(
        MixheadError, match=r"impl='flash' is unknown: choose 'auto' or one of reference, dense, gathered"
    ):
        head_attention(*make_inputs(), impl="flash")


# --- which engine runs ------------------------------------------------------------------------------------------------


def routed(queries, share, heads=4):
    """Queries, keys and a routing in which every head is selected by that share of the tokens."""
    selected = (torch.arange(queries) < share * queries).view(1, -1, 1).expand(1, queries, heads)
    q = torch.randn(1, heads, queries, 8)
    return q, q, Routing(selected.float(), selected)


@pytest.mark.parametrize(
    ("arguments", "kwargs"),
    [
        (routed(16, 0.5), {}),
        (routed(1024, 0.25), {}),
        (routed(1024, 1.0), {}),
        (routed(1024, 0.25), {"causal": True}),
        (routed(1024, 0.25), {"attn_mask": torch.ones(1024, dtype=torch.bool)}),
        (routed(0, 0.5), {}),
    ],
)
def test_explain_names_an_implementation_that_runs_and_gives_a_reason(arguments, kwargs):
    q, k, routing = arguments
    choice = explain(q, k, routing, **kwargs)
    assert choice.impl in IMPLEMENTATIONS
    assert len(choice.reason.split()) >= 5
    auto = head_attention(q, k, k, routing, **kwargs)
    assert auto.equal(head_attention(q, k, k, routing, impl=choice.impl, **kwargs))


def test_explain_never_takes_a_sparse_engine_where_nothing_is_sparse():
    assert explain(*routed(1024, 1.0)).impl == "dense"
    assert "100%" in explain(*routed(1024, 1.0)).reason


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs", [{}, {"causal": True}, {"attn_mask": torch.rand(6, 9) < 0.8}], ids=["", "causal", "mask"]
)
def test_compile_without_a_graph_break(kwargs):
    q, k, v, routing = make_inputs(6, 9, kv_heads=2)
    leaves = [t.requires_grad_() for t in (q, k, v, routing.gates_BNH)]

    def attend(q, k, v, gates, selected):
        return head_attention(q, k, v, Routing(gates, selected), **kwargs).sin()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*leaves, routing.selected_BNH), attend(*leaves, routing.selected_BNH)
    torch.testing.assert_close(out, expected)
    gradients, wanted = torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want)


# --- memory -----------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys, torch
from mixhead.ops import head_attention
from mixhead.routing import Routing

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def attend(tokens, impl, causal):
    q, k, v = (torch.randn(1, 4, tokens, 8, requires_grad=True) for _ in range(3))
    routing = Routing.from_gates((torch.rand(1, tokens, 4) < 0.5).float())
    head_attention(q, k, v, routing, impl=impl, causal=causal).sum().backward()

runs = [tuple(argument.split(",")) for argument in sys.argv[1:]]
for impl, causal in runs:
    attend(64, impl, causal == "causal")  # what is loaded at the first call does not count
for impl, causal in runs:
    before = peak_bytes()
    attend(3072, impl, causal == "causal")
    print(impl, causal, peak_bytes() - before)
"""


def test_no_tensor_of_queries_times_keys():
    """3072 tokens and 4 heads: scores would take 151 MB in float32, and 38 MB as one bool mask for all heads."""
    pytest.importorskip("resource")
    engines = ["dense,full", "gathered,full", "cpu,full", "dense,causal"]
    done = subprocess.run([sys.executable, "-c", PEAK, *engines], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(engines)
    for line in lines:
        assert int(line.split()[-1]) < 30e6, line
