"""Core, module and model: every engine is compared with float64, and one that computes something else is found."""

import pytest
import torch

from mixhead.bench import subject
from mixhead.bench.cases import BACKWARD, DECODE, FORWARD, Case
from mixhead.bench.core import CoreSpec, rows_to_check
from mixhead.bench.model import PREFILL, TRAINING, ModelSpec
from mixhead.bench.module import ModuleSpec
from mixhead.bench.routings import save_recording
from mixhead.bench.subject import MASKED, SDPA, largest_error
from mixhead.convert import MoHConfig
from mixhead.errors import MixheadError
from mixhead.ops import IMPLEMENTATIONS, Engine
from mixhead.ops.attention import dense
from mixhead.recording import keep_routing

SHAPE = Case(2, 63, True, heads=4, kv_heads=2, head_dim=8)
CASES = {
    FORWARD: SHAPE,
    BACKWARD: Case(2, 63, True, backward=True, heads=4, kv_heads=2, head_dim=8),
    DECODE: Case(2, 1, True, keys=63, heads=4, kv_heads=2, head_dim=8),
}
LLAMA = "llama:layers=1,hidden=32,heads=4,kv=2,intermediate=24,vocab=50"
DIRECTIONS = {FORWARD: PREFILL, BACKWARD: TRAINING, DECODE: DECODE}


def spec_of(kind, direction, dtype="float32", routing="random"):
    if kind == "model":
        return ModelSpec(LLAMA, MoHConfig(active=0.5), DIRECTIONS[direction], 2, 40, dtype, routing)
    return (CoreSpec if kind == "core" else ModuleSpec)(CASES[direction], dtype, routing, 0.5)


@pytest.fixture
def broken(monkeypatch):
    """An engine whose result has the wrong sign: far off, whatever the weights are."""

    def attend(q, k, v, routing, **keywords):
        return dense.attend(q, k, -v, routing, **keywords)

    monkeypatch.setitem(IMPLEMENTATIONS, "broken", Engine("broken", attend))
    return "broken"


@pytest.fixture
def wrong_gradient(monkeypatch):
    """An engine whose outputs are right and whose gradients are half of what they should be."""

    class Halve(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    monkeypatch.setitem(IMPLEMENTATIONS, "halved", Engine("halved", lambda *a, **k: Halve.apply(dense.attend(*a, **k))))
    return "halved"


@pytest.mark.parametrize("kind", ["core", "module", "model"])
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, DECODE])
def test_right_engines_are_found_right_and_wrong_ones_wrong(kind, direction, broken, wrong_gradient):
    built = spec_of(kind, direction).build()
    for engine in (MASKED, "gathered"):
        assert built.error(engine) <= built.tolerance, engine
    assert built.error(broken) > 2 * built.tolerance
    if direction == BACKWARD:
        assert built.error(wrong_gradient) > 2 * built.tolerance


@pytest.mark.parametrize("kind", ["core", "module", "model"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes_are_checked_within_their_own_precision(kind, dtype):
    built = spec_of(kind, FORWARD, dtype).build()
    assert built.error("auto") <= built.tolerance
    assert (built.tolerance < 1e-7) is (dtype == "float64")


@pytest.mark.parametrize("kind", ["module", "model"])
@pytest.mark.parametrize("routing", ["own", "skewed"])
def test_other_routings_are_checked_as_well(kind, routing, broken):
    built = spec_of(kind, FORWARD, "float32", routing).build()
    assert built.error("gathered") <= built.tolerance < built.error(broken)


@pytest.mark.parametrize("kind", ["core", "module", "model"])
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, DECODE])
def test_every_call_can_be_repeated(kind, direction):
    """A cache does not grow and gradients do not add up."""
    built = spec_of(kind, direction).build()
    for engine in (SDPA, MASKED, "auto"):
        call = built.call(engine)
        call()
        call()
    if kind == "model" and direction == DECODE:
        assert built.cache.get_seq_length() == 40


def test_the_dense_baseline_is_the_same_whatever_the_routing():
    """It computes all heads without gates: what sparse attention is to be faster than."""
    sparse, full = (CoreSpec(SHAPE, "float32", "random", share).build() for share in (0.25, 1.0))
    assert torch.equal(sparse.call(SDPA)(), full.call(SDPA)())
    assert not torch.equal(sparse.call(MASKED)(), full.call(MASKED)())


def test_a_converted_model_and_its_dense_self_share_their_weights():
    built = spec_of("model", FORWARD).build()
    dense_weights = {id(p) for p in built.dense.parameters()}
    own = [name for name, p in built.converted.named_parameters() if id(p) not in dense_weights]
    assert own and all("moh_" in name for name in own)


def test_a_model_routes_as_it_was_recorded(tmp_path):
    built = spec_of("model", FORWARD, routing="own").build()
    with keep_routing(built.converted) as log:
        built.call("auto")()
    save_recording(log, tmp_path / "r.safetensors")
    again = spec_of("model", FORWARD, routing=str(tmp_path / "r.safetensors")).build()
    with keep_routing(again.converted) as replayed:
        again.call("auto")()
    for (name, routing), (_, wanted) in zip(replayed.layers, log.layers, strict=True):
        assert torch.equal(routing.selected_BNH[0], wanted.selected_BNH[0]), name


def test_an_engine_that_hands_over_to_another_is_refused():
    """`impl="cpu"` computes float64 by portable PyTorch; a row must not carry the kernel's name then."""
    built = CoreSpec(SHAPE, "float64", "random", 0.5).build()
    with pytest.raises(MixheadError, match="float64"):
        built.call("cpu")
    with pytest.raises(MixheadError, match="no engine 'magic'"):
        built.call("magic")


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("llama:layers=0", "whole number"),
        ("llama:wings=2", "wings"),
        ("llama:heads=7", "divide"),
        ("nowhere", "folder"),
    ],
)
def test_impossible_models_are_refused(source, word):
    with pytest.raises(MixheadError, match=word):
        ModelSpec(source, MoHConfig(), PREFILL, 1, 8, "float32", "own").build()


def test_long_cases_are_checked_at_evenly_spaced_queries():
    assert rows_to_check(5, 10).tolist() == [0, 1, 2, 3, 4]
    rows = rows_to_check(100_000, 2**16)
    assert len(rows) == 2**8 and rows[0] == 0 and rows[-1] == 99_999
    assert len(rows_to_check(100_000, 2**30)) == 1


def test_errors_that_are_no_numbers_are_the_largest():
    one = [torch.ones(2)]
    assert largest_error([torch.tensor([1.0, torch.nan])], one) == float("inf")
    assert largest_error([torch.tensor([1.0, 1.5])], one) == 0.5
    assert "reference" not in subject.engines_to_time() and "gathered" in subject.engines_to_time()
