"""The Triton kernels. Where TRITON_INTERPRET=1 is set and Triton installed they run here, in Triton's interpreter.

`make test-triton` makes the environment for it. Elsewhere the tests ask what can be known without running a kernel.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from engines import missing
from torch._subclasses import FakeTensorMode

from mixhead.errors import MixheadError
from mixhead.ops import explain, head_attention, triton
from mixhead.ops.triton import operators
from mixhead.routing import Routing
from mixhead.routing.selection import grouped_top_k_mask

WHY_NOT = missing("triton")
interpreted = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")


def make(queries, keys=None, *, batch=1, heads=4, kv_heads=2, head_dim=16, dtype=torch.float32, device="cpu"):
    keys = queries if keys is None else keys
    q = torch.randn(batch, heads, queries, head_dim, device=device).to(dtype)
    k, v = (torch.randn(batch, kv_heads, keys, head_dim, device=device).to(dtype) for _ in range(2))
    selected = torch.rand(batch, queries, heads, device=device) < 0.5
    return q, k, v, torch.randn(batch, queries, heads, device=device).to(dtype), selected


def outcome(q, k, v, gates, selected, grad, impl="triton", **kwargs):
    """Output and gradients of q, k, v and the gates (those at selected heads)."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, gates)]
    out = head_attention(*leaves[:3], Routing(torch.where(selected, leaves[3], 0.0), selected), impl=impl, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_close_to_reference(inputs, **kwargs):
    grad = torch.randn_like(inputs[0])
    *tensors, selected = inputs
    wide = {n: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in kwargs.items()}
    exact = outcome(*(t.double() for t in tensors), selected, grad.double(), impl="reference", **wide)
    for name, a, e in zip(("out", "dq", "dk", "dv", "dgates"), outcome(*inputs, grad, **kwargs), exact, strict=True):
        error = (a - e).abs().max().item() / max(1.0, e.abs().max().item())
        assert error <= TOLERANCE[grad.dtype], f"{name}: {error}"


# --- in the interpreter -----------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 90), (33, 33), (70, 150), (150, 70)])
@pytest.mark.parametrize("causal", [False, True])
def test_sizes_and_dtypes(queries, keys, causal, dtype):
    assert_close_to_reference(make(queries, keys, dtype=dtype), causal=causal)


@interpreted
@pytest.mark.parametrize("head_dim", [8, 15, 16, 17, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dimensions(head_dim, dtype):
    assert_close_to_reference(make(40, head_dim=head_dim, dtype=dtype), causal=True)


@interpreted
@pytest.mark.parametrize("shape", [(90,), (90, 1), (2, 1, 1, 90), (1, 4, 90, 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masks(shape, dtype, kind):
    mask = torch.rand(shape) < 0.6 if kind == "bool" else torch.randn(shape).to(dtype)
    inputs = make(90, batch=2, dtype=dtype)
    assert_close_to_reference(inputs, attn_mask=mask)
    assert_close_to_reference(inputs, attn_mask=mask.mT if len(shape) == 4 else mask, causal=True)


@interpreted
def test_a_gate_of_zero_has_a_gradient_where_its_head_is_selected():
    q, k, v, gates, selected = make(40)
    gates[:, ::3] = 0.0
    assert_close_to_reference((q, k, v, gates, selected))


@interpreted
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_numbers_stay_where_they_belong(bad):
    q, k, v, gates, selected = make(40)
    selected[0, 10, 0], selected[0, 11, 0] = True, False
    grad = torch.randn_like(q)
    clean = outcome(q, k, v, gates, selected, grad)
    hidden = q.clone()
    hidden[0, 0, 11] = bad  # not selected: nobody sees it, in the gradients neither
    assert all(torch.equal(a, b) for a, b in zip(clean, outcome(hidden, k, v, gates, selected, grad), strict=True))
    q[0, 0, 10, 3] = bad  # selected: its own row is lost, no other
    out = outcome(q, k, v, gates, selected, grad)[0]
    assert not out[0, 0, 10].isfinite().any()
    out[0, 0, 10] = clean[0][0, 0, 10]
    assert torch.equal(out, clean[0])


@interpreted
def test_it_is_deterministic():
    inputs = make(100, kv_heads=1)
    grad = torch.randn_like(inputs[0])
    first = outcome(*inputs, grad, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(first, outcome(*inputs, grad, causal=True), strict=True))


@interpreted
def test_operator_checks():
    q, k, v, gates, selected = make(20, 24)
    leaves = [t.requires_grad_() for t in (q, k, v, gates)]
    for mask in (None, torch.rand(1, 1, 1, 24) < 0.7):
        torch.library.opcheck(
            torch.ops.mixhead.attend_triton.default,
            (*leaves, selected, mask, mask is None, 0.25, True),
            atol=1e-3, rtol=1e-2,
        )  # fmt: skip


@interpreted
def test_torch_compile_without_graph_breaks():
    q, k, v, gates, selected = make(30)

    def layer(q, k, v, gates):
        routing = Routing(gates * selected, selected)
        return head_attention(q, k, v, routing, causal=True, impl="triton").square().mean()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in (q, k, v, gates)]
    expected, actual = layer(*leaves), compiled(*leaves)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, e)


@interpreted
@pytest.mark.parametrize("mask", [None, "bool"])
def test_no_list_is_made_by_reading_a_tensor(mask):
    """Reading a number out of a fake tensor raises; of a real one it would make a device wait for the host."""
    with FakeTensorMode():
        q, k, _, gates, selected = make(300)
        mask = mask and torch.ones(300, dtype=torch.bool)
        arguments = operators.launch(q, k, gates, selected, mask, True, 1.0)
        assert [t.shape for t in arguments.lists] == 3 * [(1, 4, 300)]


@interpreted
def test_a_second_derivative_is_refused():
    q, k, v, gates, selected = make(20)
    out = head_attention(q.requires_grad_(), k, v, Routing(gates * selected, selected), impl="triton")
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dq.sum().backward()


@interpreted
@pytest.mark.parametrize(("dtype", "head_dim"), [("fp16", 64), ("fp32", 64), ("bf16", 256)])
def test_the_compiler_takes_them(dtype, head_dim, tmp_path):
    """The interpreter forgives what the compiler does not. It needs no GPU, and must not be told to interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, dtype, str(head_dim)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    shared = [int(line) for line in run.stdout.split()]
    assert len(shared) == 3
    assert all(0 < size <= 99 * 1024 for size in shared), f"more shared memory than every GPU since 2020 has: {shared}"


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mixhead.ops.triton import kernels
from mixhead.ops.triton.operators import blocks

dtype, head_dim = sys.argv[1], int(sys.argv[2])
for kernel in (kernels.forward, kernels.query_gradient, kernels.key_gradient):
    fixed = {"CAUSAL": True, "MASK": 1, "KEEP": True, "INTERPRETED": False}
    fixed |= {name: 1 for name in kernel.arg_names if name.endswith("_d")}  # the stride of the last axis
    fixed |= blocks(head_dim, 4 if dtype == "fp32" else 2)
    options = {name: fixed.pop(name) for name in ("num_warps", "num_stages")}
    fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    kinds = {"mask": "*u8", "positions": "*i64", "ranks": "*i64", "log_sums": "*fp32", "dgates": "*fp32"}
    kinds |= dict.fromkeys(("q", "k", "v", "grad", "gates", "out", "plain", "dq", "dk", "dv"), "*" + dtype)
    kinds |= {"scale": "fp32"} | dict.fromkeys(fixed, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in kinds
               and signature[name].startswith("*")}
    source = ASTSource(kernel, signature, fixed, aligned)
    print(triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).metadata.shared)
"""


# --- without running a kernel -----------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """`installed(False)` hides the package, `installed(True)` pretends that it is there."""

    def pretend(present):
        spec = importlib.util.find_spec
        monkeypatch.setattr(triton.importlib.util, "find_spec", lambda n: present or None if n == "triton" else spec(n))
        triton.missing.cache_clear()

    yield pretend
    triton.missing.cache_clear()


def test_without_the_package_a_sentence_says_so(installed):
    installed(False)
    q, k, v, gates, selected = make(9)
    with pytest.raises(
        MixheadError, match=r"impl='triton' cannot take these arguments: the package triton is not inst"
    ):
        head_attention(q, k, v, Routing(gates, selected), impl="triton")


def test_what_it_does_not_compute_is_refused():
    q, k, v, gates, selected = make(9)
    routing = Routing(gates, selected)
    with pytest.raises(MixheadError, match=r"not in torch.float64"):
        head_attention(q.double(), k.double(), v.double(), routing, impl="triton")
    with pytest.raises(MixheadError, match="no gradient of the mask"):
        head_attention(q, k, v, routing, attn_mask=torch.zeros(9, 9, requires_grad=True), impl="triton")
    wide = make(9, head_dim=257)
    with pytest.raises(MixheadError, match="up to 256 wide, and these are 257 wide"):
        head_attention(*wide[:3], routing, impl="triton")
    assert "the queries are on meta" in triton.refusal(q.to("meta"), None)


def test_on_a_device_auto_chooses_without_waiting_for_it(installed):
    """Reading a value of a fake tensor raises, as it would stop a device."""

    def choice(queries, dtype=torch.float16, share=None, **kwargs):
        q, k, _, gates, selected = make(queries, heads=8, kv_heads=2, dtype=dtype, device="cuda")
        promise = {}
        if share is not None:
            selected = grouped_top_k_mask(gates, share * 2, 2)
            promise = {"heads_per_group": share, "num_groups": 2}
        return explain(q, k, Routing(gates, selected, **promise), **kwargs)

    with FakeTensorMode():
        installed(True)
        assert choice(1024).impl == choice(1024, causal=True).impl == "triton"
        assert choice(1024, share=2).impl == "slots", "the stock kernel on fewer heads, where their number is known"
        assert choice(1024, share=3).impl == "triton"
        assert choice(1).impl == "dense"
        assert "1 queries" in choice(1).reason
        assert choice(1024, dtype=torch.float64).impl == "dense"
        assert "float64" in choice(1024, dtype=torch.float64).reason
        bias = torch.zeros(1, 1, 1024, 1024, requires_grad=True)
        assert choice(1024, attn_mask=bias).impl == "dense"
        installed(False)
        assert choice(1024).impl == "dense"
        assert "not installed" in choice(1024).reason


def test_shapes_on_a_device_are_known_without_it(installed):
    installed(True)
    with FakeTensorMode(), torch.no_grad():
        q, k, v, gates, selected = make(300, device="cuda")
        out = head_attention(q, k, v, Routing(gates, selected), causal=True, impl="triton")
        _, *kept = torch.ops.mixhead.attend_triton(q, k, v, gates, selected, None, True, 0.25, True)
        gradients = torch.ops.mixhead.attend_triton_backward(out, q, k, v, gates, selected, None, *kept, True, 0.25)
    assert out.shape == q.shape
    assert out.transpose(1, 2).is_contiguous(), "as the output projection reads it"
    assert [g.shape for g in gradients] == [t.shape for t in (q, k, v, gates)]
