"""A few queries against a cache: what the CPU kernel computes there, and what it does not read."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mixhead.ops import cpu, explain, head_attention
from mixhead.ops.cpu.level import LEVELS, kind_of_processor
from mixhead.routing import Routing

BUILT, WHY_NOT = cpu.available()
pytestmark = pytest.mark.skipif(not BUILT, reason=WHY_NOT)

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def make(queries, keys, *, batch=2, heads=4, kv_heads=4, head_dim=64, share=0.5, dtype=torch.float32):
    """q, k, v, gates and the selected heads; every row of the batch selects others."""
    q = torch.randn(batch, heads, queries, head_dim).to(dtype)
    k, v = (torch.randn(batch, kv_heads, keys, head_dim).to(dtype) for _ in range(2))
    gates = (torch.rand(batch, queries, heads) + 0.5).to(dtype)
    return q, k, v, gates, torch.rand(batch, queries, heads) < share


def outcome(q, k, v, gates, selected, grad, impl="cpu", **kwargs):
    """Output and gradients of q, k, v and the gates."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v, gates)]
    out = head_attention(*leaves[:3], Routing(torch.where(selected, leaves[3], 0.0), selected), impl=impl, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def forward(q, k, v, gates, selected, impl="cpu", **kwargs):
    return head_attention(q, k, v, Routing(gates * selected, selected), impl=impl, **kwargs)


def exact(inputs, grad, **kwargs):
    wide = {n: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in kwargs.items()}
    return outcome(*(t.double() for t in inputs[:4]), inputs[4], grad.double(), impl="reference", **wide)


def assert_close_to_reference(inputs, **kwargs):
    grad = torch.randn_like(inputs[0])
    found, expected = outcome(*inputs, grad, **kwargs), exact(inputs, grad, **kwargs)
    for name, a, e in zip(("out", "dq", "dk", "dv", "dgates"), found, expected, strict=True):
        error = (a - e).abs().max().item()
        assert error <= TOLERANCE[grad.dtype] * max(1.0, e.abs().max().item()), f"{name}: {error}"
    # Without gradients another operator runs the same kernel.
    assert torch.equal(forward(*inputs, **kwargs), found[0])


@pytest.mark.parametrize("keys", [1, 2, 15, 16, 17, 63, 255, 256, 257, 1000])
@pytest.mark.parametrize("queries", [1, 3])
def test_odd_sizes(queries, keys):
    assert_close_to_reference(make(queries, keys), causal=True)
    assert_close_to_reference(make(queries, keys), causal=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [1, 8, 12, 32, 63, 80, 128, 200, 256])
def test_head_dimensions(head_dim, dtype):
    assert_close_to_reference(make(2, 70, head_dim=head_dim, dtype=dtype), causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("queries", [1, 4, 7])
def test_queries_of_a_group_share_keys_and_values(queries, kv_heads, dtype):
    for share in (0.3, 1.1):
        assert_close_to_reference(make(queries, 300, heads=8, kv_heads=kv_heads, share=share, dtype=dtype), causal=True)


def test_more_queries_than_keys():
    """The first queries of a causal mask see nothing."""
    inputs = make(7, 3, share=1.1)
    assert_close_to_reference(inputs, causal=True)
    assert (forward(*inputs, causal=True)[:, :, :4] == 0).all()


@pytest.mark.parametrize("kind", ["boolean", "additive", "additive of infinity"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 600), (2, 1, 3, 600), (1, 8, 3, 600), (1, 8, 1, 1), (600,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks(shape, kind, dtype):
    allowed = torch.rand(shape) < 0.6
    mask = {
        "boolean": allowed,
        "additive": torch.randn(shape).to(dtype),
        "additive of infinity": torch.zeros(shape).masked_fill(~allowed, -torch.inf).to(dtype),
    }[kind]
    inputs = make(3, 600, heads=8, kv_heads=2, dtype=dtype)
    for causal in (False, True):
        assert_close_to_reference(inputs, attn_mask=mask, causal=causal)


@pytest.mark.parametrize("queries", [1, 4])
def test_a_static_cache_and_left_padding(queries):
    """A long buffer of which a mask shows the part that is filled, another part for each row of the batch."""
    q, k, v, gates, selected = make(queries, 1100, kv_heads=2)
    position = torch.arange(1100)
    newest = torch.arange(700 - queries, 700).unsqueeze(-1)
    allowed = (position <= newest) & (position >= torch.tensor([0, 300]).view(2, 1, 1, 1))
    found = forward(q, k, v, gates, selected, attn_mask=allowed)
    for row, start in enumerate([0, 300]):
        alone = [t[row : row + 1] for t in (q, k[:, :, start:700], v[:, :, start:700], gates, selected)]
        torch.testing.assert_close(found[row : row + 1], forward(*alone, impl="reference", causal=True))
    assert_close_to_reference((q, k, v, gates, selected), attn_mask=allowed)


def test_where_a_mask_hides_everything_the_output_is_zero():
    q, k, v, gates, selected = make(2, 400, share=1.1)
    allowed = torch.ones(2, 1, 2, 400, dtype=torch.bool)
    allowed[1, :, 0] = False
    out = forward(q, k, v, gates, selected, attn_mask=allowed)
    assert (out[1, :, 0] == 0).all()
    assert (out[1, :, 1] != 0).all()
    assert_close_to_reference((q, k, v, gates, selected), attn_mask=allowed)


def test_caches_are_read_where_they_lie():
    q, k, v, gates, selected = make(1, 300)
    buffer = [torch.full((2, 4, 512, 64), torch.nan) for _ in range(2)]
    for room, t in zip(buffer, (k, v), strict=True):
        room[:, :, :300] = t
    layouts = {
        "by token": [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)],
        "not aligned": [torch.zeros(t.numel() + 1)[1:].view(t.shape).copy_(t) for t in (k, v)],
        "part of a buffer": [room[:, :, :300] for room in buffer],
        "wide rows": [torch.cat([t, t], -1)[..., :64] for t in (k, v)],
        "transposed": [t.mT.contiguous().mT for t in (k, v)],
    }
    expected = forward(q, k, v, gates, selected)
    for name, (keys, values) in layouts.items():
        assert torch.equal(forward(q, keys, values, gates, selected), expected), name
    one = [t[:, :1].expand(-1, 4, -1, -1) for t in (k, v)]
    assert_close_to_reference((q, *one, gates, selected))


def test_keys_and_values_that_no_query_selects_do_not_matter():
    q, k, v, gates, selected = make(2, 600, batch=3, heads=8, kv_heads=4)
    unused = ~selected.view(3, 2, 4, 2).any(3).any(1)  # [batch, kv_heads]
    unused[0, 1], selected[0, :, 2:4] = True, False
    clean = forward(q, k, v, gates, selected, causal=True)
    k[unused], v[unused] = torch.nan, torch.nan
    assert torch.equal(forward(q, k, v, gates, selected, causal=True), clean)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it forbids memory as Linux does")
def test_what_is_not_selected_or_behind_the_mask_is_not_read():
    """A read would end the process: the pages of one head and of the unused end of a static cache are forbidden."""
    program = (
        "import ctypes, mmap, torch\n"
        "from mixhead.ops import head_attention\n"
        "from mixhead.routing import Routing\n"
        "memory = mmap.mmap(-1, 4 * 1024 * 64 * 4)\n"  # 4 heads, 1024 keys of 64 numbers
        "cache = torch.frombuffer(memory, dtype=torch.float32).view(1, 4, 1024, 64)\n"
        "cache.copy_(torch.randn(1, 4, 1024, 64))\n"
        "q, gates = torch.randn(1, 4, 1, 64), torch.tensor([[[1.0, 0.0, 0.5, 2.0]]])\n"
        "allowed = torch.arange(1024).view(1, 1, 1, -1) < 512\n"
        "run = lambda: head_attention(q, cache, cache, Routing.from_gates(gates), attn_mask=allowed, impl='cpu')\n"
        "before = run()\n"
        "for head, first, count in ((0, 512, 512), (1, 0, 1024), (2, 512, 512), (3, 512, 512)):\n"
        "    address = cache[0, head, first].data_ptr()\n"
        "    failed = ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(count * 256), 0)\n"
        "    assert not failed\n"
        "assert torch.equal(run(), before)\n"
        "print('not read', flush=True)\n"
        "import os; os._exit(0)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert run.stdout == "not read\n", (run.returncode, run.stderr[-2000:])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_numbers_stay_where_they_belong(bad, dtype):
    q, k, v, gates, selected = make(3, 600, dtype=dtype)
    selected[0, :, 0] = torch.tensor([True, False, True])
    clean = forward(q, k, v, gates, selected, causal=True)
    q[0, 0, 0, 3], q[0, 0, 1] = bad, bad
    out = forward(q, k, v, gates, selected, causal=True)
    assert not out[0, 0, 0].isfinite().any()
    out[0, 0, 0] = clean[0, 0, 0]
    assert torch.equal(out, clean)
    q[0, 0, :2] = 0.0
    k[0, 0, 599] = torch.nan  # only the last query sees it
    out = forward(q, k, v, gates, selected, causal=True)
    assert out[0, 0, 2].isnan().all()
    assert not out[0, 0, :2].isnan().any()
    assert torch.equal(out[1:], clean[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_scores(dtype):
    """Maxima that rise or fall from piece to piece, hundreds apart."""
    q, k, v, gates, selected = make(2, 900, share=1.1, dtype=dtype)
    k *= torch.linspace(0.1, 12, 900).to(dtype)[:, None]
    for keys in (k, k.flip(2)):
        expected = forward(*(t.double() for t in (q, keys, v, gates)), selected, impl="reference")
        error = (forward(q, keys, v, gates, selected) - expected).abs().max()
        assert error <= 5 * TOLERANCE[dtype] * expected.abs().max()


def test_errors_are_no_larger_than_those_of_the_stock_kernel():
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, gates, selected = make(1, 3000, batch=4, share=1.1, dtype=dtype)
        gates.fill_(1.0)
        expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        ours = (forward(q, k, v, gates, selected) - expected).norm()
        assert ours <= 1.1 * (F.scaled_dot_product_attention(q, k, v) - expected).norm()


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_neither_a_second_run_nor_the_number_of_threads_matters(kv_heads):
    inputs, before, results = make(3, 3000, batch=1, kv_heads=kv_heads), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 5):
            torch.set_num_threads(threads)
            results.append(forward(*inputs, causal=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("share", [0.3, 1.1])
def test_at_the_border_to_the_kernel_for_many_queries_nothing_changes(share):
    for queries in (15, 16, 17, 31, 32, 33):
        assert_close_to_reference(make(queries, 100, share=share), causal=True)


def test_operator_checks():
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, gates, selected = make(2, 50, kv_heads=2, head_dim=16, dtype=dtype)
        arguments = (selected, torch.rand(2, 1, 1, 50) < 0.7, False, 0.25)
        torch.library.opcheck(torch.ops.mixhead.attend_cpu_inference.default, (q, k, v, gates, *arguments))
        leaves = [t.requires_grad_() for t in (q, k, v, gates)]
        torch.library.opcheck(torch.ops.mixhead.attend_cpu.default, (*leaves, *arguments), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("training", [False, True])
def test_torch_compile_without_graph_breaks(training):
    q, k, v, gates, selected = make(1, 300)

    def layer(q, k, v, gates):
        return head_attention(q, k, v, Routing(gates * selected, selected), causal=True).square().mean()

    leaves = [t.requires_grad_(training) for t in (q, k, v, gates)]
    expected, actual = layer(*leaves), torch.compile(layer, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(actual, expected)
    assert actual.requires_grad == training


def test_auto_decodes_with_it():
    for dtype in (torch.float32, torch.bfloat16):
        for queries, keys in ((1, 1), (1, 100), (16, 100)):
            q, k, _, gates, selected = make(queries, keys, dtype=dtype)
            assert explain(q, k, Routing(gates, selected), causal=True).impl == "cpu"
    q, k, _, gates, selected = make(1, 100, dtype=torch.float64)
    assert explain(q, k, Routing(gates, selected), causal=True).impl == "dense"


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS[kind_of_processor()])
def test_every_instruction_set(level):
    """The builds for lesser CPUs, which this one can run as well."""
    levels = list(LEVELS[kind_of_processor()])
    if levels.index(level) <= levels.index(cpu.best_level()):
        pytest.skip("the other tests run the best one of this CPU; a better one it cannot run")
    tests = "odd_sizes or head_dimensions or group or masks or static or bad_numbers or far_scores or threads"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", tests]
    run = subprocess.run(command, env={**os.environ, "MIXHEAD_CPU_LEVEL": level}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
