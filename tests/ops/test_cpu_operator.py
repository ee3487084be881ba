"""The C++ kernel as an operator of PyTorch: threads, memory, compiling, derivatives, and what it refuses."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_inputs import make, needs_kernel, outcome

from mixhead.bench.memory import resident_mib
from mixhead.errors import MixheadError
from mixhead.ops import cpu, explain, head_attention
from mixhead.ops.cpu.level import LEVELS, kind_of_processor
from mixhead.routing import Routing


@needs_kernel
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_it_is_deterministic(kv_heads):
    inputs = make(300, batch=1, kv_heads=kv_heads)
    grad = torch.randn_like(inputs[0])
    first = outcome(*inputs, grad, causal=True)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, outcome(*inputs, grad, causal=True), strict=True))


@needs_kernel
def test_the_number_of_threads_does_not_matter():
    inputs = make(300, batch=1, kv_heads=1)
    grad, before, results = torch.randn_like(inputs[0]), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(outcome(*inputs, grad, causal=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="how long each thread ran is read from /proc")
def test_it_runs_on_several_threads():
    """By the time that each thread of a fresh process has spent: without OpenMP the first one does all the work."""
    script = """if True:
        import os, pathlib, torch
        from mixhead.ops import head_attention
        from mixhead.routing import Routing
        torch.set_num_threads(2)
        q, k, v = torch.ones(3, 1, 4, 1500, 64)
        routing = Routing.from_gates(torch.ones(1, 1500, 4))
        for _ in range(20):
            head_attention(q, k, v, routing, impl="cpu")
        tasks = pathlib.Path("/proc/self/task").iterdir()
        ticks = [int((task / "stat").read_text().rsplit(") ")[1].split()[11]) for task in tasks]
        print(sum(spent >= 10 for spent in ticks))
    """
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 2


@needs_kernel
def test_eight_threads_may_call_at_once():
    inputs = make(150)
    grad = torch.randn_like(inputs[0])
    expected = outcome(*inputs, grad)
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(lambda _: outcome(*inputs, grad), range(32)):
            assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))


@needs_kernel
def test_memory_does_not_grow():
    def calls(count):
        for i in range(count):
            q, k, v, gates, selected = make(1 + i % 37, 1 + i % 53, batch=1, head_dim=8 + i % 9)
            q.requires_grad_(i % 4 == 0)
            out = head_attention(q, k, v, Routing(gates * selected, selected), impl="cpu")
            if q.requires_grad:
                out.sum().backward()

    calls(500)
    before = resident_mib()
    calls(10_000)
    assert resident_mib() - before < 8


@needs_kernel
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_it_works_in_a_forked_process():
    """As in a data loader's workers, which run one thread."""
    program = (
        "import os, torch\n"
        "from mixhead.ops import head_attention\n"
        "from mixhead.routing import Routing\n"
        "torch.set_num_threads(2)\n"
        "q = torch.randn(1, 4, 80, 32); r = Routing.from_gates(torch.rand(1, 80, 4).round())\n"
        "a = head_attention(q, q, q, r, impl='cpu')\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    torch.set_num_threads(1)\n"
        "    os._exit(0 if torch.equal(a, head_attention(q, q, q, r, impl='cpu')) else 1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


@needs_kernel
def test_operator_checks():
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, gates, selected = make(40, 50, kv_heads=2, head_dim=16, dtype=dtype)
        leaves = [t.requires_grad_() for t in (q, k, v, gates)]
        for mask in (None, torch.rand(2, 1, 1, 50) < 0.7):
            torch.library.opcheck(
                torch.ops.mixhead.attend_cpu.default,
                (*leaves, selected, mask, mask is None, 0.25),
                atol=1e-3, rtol=1e-2,
            )  # fmt: skip


@needs_kernel
@pytest.mark.parametrize(("impl", "queries"), [("cpu", 70), ("auto", 70), ("auto", 520)])
def test_torch_compile_without_graph_breaks(impl, queries):
    q, k, v, gates, selected = make(queries)

    def layer(q, k, v, gates):
        return head_attention(q, k, v, Routing(gates * selected, selected), causal=True, impl=impl).square().mean()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in (q, k, v, gates)]
    expected, actual = layer(*leaves), compiled(*leaves)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, e)


@needs_kernel
def test_a_second_derivative_is_refused():
    q, k, v, gates, selected = make(20)
    q.requires_grad_()
    out = head_attention(q, k, v, Routing(gates * selected, selected), impl="cpu")
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative. Pass impl='reference'"):
        dq.sum().backward()


def test_the_reference_has_the_second_derivative_that_others_lack():
    q, k, v, gates, selected = make(5)
    leaves = [x.double().requires_grad_() for x in (q, k, v, gates * selected)]
    assert torch.autograd.gradgradcheck(
        lambda q, k, v, g: head_attention(q, k, v, Routing(g, selected), impl="reference"), leaves, fast_mode=True
    )


@needs_kernel
def test_what_it_refuses_goes_another_way_by_itself_and_is_refused_by_name():
    q, k, v, gates, selected = make(20)
    routing = Routing(gates * selected, selected)
    assert "float64" in cpu.refusal(q.double(), None)
    bias = torch.randn(20, 20, requires_grad=True)
    assert "mask" in cpu.refusal(q, bias)
    with pytest.raises(MixheadError, match=r"impl='cpu' cannot take these arguments: .* no gradient of the mask"):
        head_attention(q, k, v, routing, attn_mask=bias, impl="cpu")
    with pytest.raises(MixheadError, match=r"impl='cpu' cannot take these arguments: .* not in torch.float64"):
        head_attention(q.double(), k.double(), v.double(), routing, impl="cpu")
    head_attention(q, k, v, routing, attn_mask=bias).sum().backward()
    assert bias.grad.abs().sum() > 0


@needs_kernel
@pytest.mark.parametrize("wrong", ["k", "v", "gates", "selected", "dtype"])
def test_what_does_not_fit_is_told_and_never_read(wrong):
    """`auto` asks the kernel first, which refuses; users get a sentence."""
    q, k, v, gates, selected = make(5)
    k = k[:, :3] if wrong == "k" else k
    v = v[:, :, :2] if wrong == "v" else v.bfloat16() if wrong == "dtype" else v
    gates = gates[:1] if wrong == "gates" else gates
    selected = selected[..., :3] if wrong == "selected" else selected
    with pytest.raises(RuntimeError, match=r"fit|dtype"):
        torch.ops.mixhead.attend_cpu_inference(q, k, v, gates, selected, None, False, 0.125)
    with pytest.raises(MixheadError, match=r"must (be|have)"):
        head_attention(q, k, v, Routing(gates, selected))


@needs_kernel
@pytest.mark.parametrize("empty", [{"queries": 0}, {"queries": 3, "keys": 0}, {"queries": 3, "batch": 0}], ids=str)
def test_where_there_is_nothing_to_compute_the_output_is_zero(empty):
    q, k, v, gates, selected = make(**empty)
    out = head_attention(q, k, v, Routing(gates * selected, selected))
    assert out.shape == q.shape
    assert not out.any()


@needs_kernel
def test_auto_takes_it_where_it_pays():
    q, k, _, gates, selected = make(1024, batch=1)
    assert explain(q, k, Routing(gates * selected, selected), causal=True).impl == "cpu"
    narrow = make(64, head_dim=16)
    assert explain(narrow[0], narrow[1], Routing(narrow[3] * narrow[4], narrow[4])).impl != "cpu"


@needs_kernel
@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS[kind_of_processor()])
def test_every_instruction_set(level):
    """The builds for lesser CPUs, which this one can run as well."""
    levels = list(LEVELS[kind_of_processor()])
    if levels.index(level) <= levels.index(cpu.best_level()):
        pytest.skip("the other tests run the best one of this CPU; a better one it cannot run")
    tests = "odd_sizes or head_dimensions or masks or bf16 or bad_numbers or far_scores or other_widths"
    files = [__file__, str(Path(__file__).with_name("test_aggregated.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", tests]
    run = subprocess.run(command, env={**os.environ, "MIXHEAD_CPU_LEVEL": level}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
