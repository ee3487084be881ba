"""torch.compile on every engine that `auto` can take: whole graphs, forward and backward, one for all lengths."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mixhead.ops import (
    RelativeBias,
    aggregated_attention,
    convolutional_glu,
    cpu,
    head_attention,
    project_from_heads,
    project_from_slots,
    project_to_heads,
    project_to_slots,
)
from mixhead.ops.crossover import Point, Table, rulings
from mixhead.routing import Routing

needs_kernel = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])
KERNEL = pytest.param("cpu", marks=needs_kernel)
LENGTHS = (70, 300, 9)
LOST = Point("attention", "cpu", "float32", 1, 1, 1.0, 0.5, 0.5)


@pytest.fixture(autouse=True)
def from_the_start():
    """Otherwise what was compiled for one engine would count as a change for the next."""
    torch.compiler.reset()


@pytest.fixture(params=["kernel wins", "kernel loses"])
def either_way(request, monkeypatch):
    """A table after which `auto` takes the kernel, or the stock one."""
    kinds = ("float32", "float32 gradient", "float32 causal", "float32 causal gradient", "float32 cache")
    speed = 2.0 if request.param == "kernel wins" else 0.5
    operators = ("attention", "aggregated attention", "glu")
    points = [replace(LOST, operator=o, kind=kind, ratio=speed, bare=speed) for o in operators for kind in kinds]
    table = Table(tuple(points))
    monkeypatch.setattr(rulings, "table", lambda operator, threads: table)


def compare(function, inputs, training, graphs=None, **options):
    """Runs a function as it is and compiled, on one set of leaves after another; all must agree, in one graph."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, **options)
    for leaves in inputs:
        leaves = [t.requires_grad_(training and t.is_floating_point()) for t in leaves]
        expected, actual = function(*leaves), compiled(*leaves)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        if training:
            learning = [t for t in leaves if t.requires_grad]
            for a, e in zip(*(torch.autograd.grad(y.sum(), learning) for y in (actual, expected)), strict=True):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-3)
    assert counter.frame_count == (graphs or 1)


def attention_inputs(queries, keys=None):
    """q, k, v, gates and a selection of every other head, which slots can pack too."""
    selected = (torch.arange(4) % 2 == 0).expand(2, queries, 4)
    keys = keys or queries
    states = (torch.randn(2, 4, queries, 32), torch.randn(2, 2, keys, 32), torch.randn(2, 2, keys, 32))
    return [*states, torch.rand(2, queries, 4) + 0.5, selected]


def attend(q, k, v, gates, selected, impl="auto", promised=True, **kwargs):
    routing = Routing(gates * selected, selected)
    if promised:
        routing = Routing(gates * selected, selected, heads_per_group=1, num_groups=2)
    return head_attention(q, k, v, routing, impl=impl, **kwargs)


@pytest.mark.parametrize("impl", ["dense", "slots", "reference", KERNEL])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_one_graph_of_attention_for_every_length(impl, causal, training):
    """All sizes are symbols: none may become a flag of the stock kernel, and none may be compiled for alone."""
    compare(partial(attend, impl=impl, causal=causal), map(attention_inputs, LENGTHS), training, dynamic=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("promised", [False, True])
def test_auto_is_one_graph_for_every_length(either_way, causal, training, promised):
    compare(partial(attend, causal=causal, promised=promised), map(attention_inputs, LENGTHS), training, dynamic=True)


@pytest.mark.parametrize("training", [False, True])
def test_auto_is_one_graph_where_only_the_length_is_dynamic(either_way, training):
    def marked(queries):
        inputs = attention_inputs(queries)
        for t in inputs[:3]:
            torch._dynamo.mark_dynamic(t, 2)
        for t in inputs[3:]:
            torch._dynamo.mark_dynamic(t, 1)
        return inputs

    compare(partial(attend, causal=True), map(marked, LENGTHS), training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (64, 100), (1, 100), (3, 100)])
def test_auto_with_static_sizes(either_way, queries, keys, training):
    compare(partial(attend, causal=True), [attention_inputs(queries, keys)], training, dynamic=False)


def test_auto_decodes_against_a_growing_cache_in_one_graph(either_way):
    def marked(keys):
        inputs = attention_inputs(1, keys)
        for t in inputs[1:3]:
            torch._dynamo.mark_dynamic(t, 2)
        return inputs

    compare(partial(attend, causal=True), map(marked, (100, 101, 400)), training=False)


def test_a_mask_of_the_tokens():
    def layer(q, k, v, gates, selected):
        return attend(q, k, v, gates, selected, attn_mask=torch.arange(k.shape[2]) < 5, causal=True)

    compare(layer, map(attention_inputs, LENGTHS), training=True, dynamic=True)


@pytest.mark.parametrize("impl", ["auto", "dense", KERNEL])
def test_projections_of_heads(impl):
    def both(hidden, weight, selected):
        q = project_to_heads(hidden, weight, None, selected, impl=impl)
        return project_from_heads(q, weight, None, selected, impl=impl)

    def inputs(tokens):
        return [torch.randn(2, tokens, 24), torch.randn(4, 16, 24), torch.rand(2, tokens, 4) < 0.5]

    compare(both, map(inputs, LENGTHS), training=True, dynamic=True)


@pytest.mark.parametrize("impl", ["auto", "dense", KERNEL])
def test_projections_of_experts(impl):
    def both(hidden, weight, expert):
        return project_from_slots(project_to_slots(hidden, weight, expert, impl=impl), weight, expert, impl=impl)

    def inputs(tokens):
        return [torch.randn(2, tokens, 24), torch.randn(5, 16, 24), torch.rand(2, tokens, 5).argsort(-1)[..., :2]]

    compare(both, map(inputs, LENGTHS), training=True, dynamic=True)


@pytest.mark.parametrize("training", [False, True])
def test_aggregated_attention(either_way, training):
    rows, columns = torch.zeros(7, 2, dtype=torch.int64), torch.zeros(9, 3, dtype=torch.int64)

    def layer(q, k, v, pooled, gates, selected, table):
        routing = Routing(gates * selected, selected)
        parameters = {"query_embedding_HD": q[0, :, 0], "temperature_H": q[0, :, 0, 0].exp()}
        parameters |= {"local_bias_HL": q[0, :, 0, :9], "learnable_tokens_HDL": q[0, :, :24, :9]}
        return aggregated_attention(
            q, k, v, pooled, pooled, routing, size=(7, 9), pool_bias=RelativeBias(table, rows, columns),
            learnable_bias_HL=q[0, :, 0, :9], **parameters,
        )  # fmt: skip

    def inputs(batch):
        states = [torch.randn(batch, 3, tokens, 24) for tokens in (63, 63, 63, 6)]
        return [*states, torch.rand(batch, 63, 3), torch.rand(batch, 63, 3) < 0.5, torch.randn(3, 4, 5)]

    compare(layer, [inputs(2)], training, dynamic=False)


@pytest.mark.parametrize("training", [False, True])
def test_the_convolutional_glu(either_way, training):
    def inputs(batch):
        return [torch.randn(batch, 63, 32), torch.randn(32), torch.randn(16, 3, 3), torch.randn(16)]

    compare(partial(convolutional_glu, size=(7, 9)), map(inputs, (2, 3, 5)), training, dynamic=True)
