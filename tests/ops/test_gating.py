"""Gates of heads that are all computed, in one pass: as PyTorch computes them, and deaf to what nobody selects."""

import pytest
import torch

from mixhead.ops import cpu
from mixhead.ops.gating import can_gate, gate_heads_


def arguments(dtype, batch=2, tokens=197, heads=5, head_dim=24):
    by_token = torch.randn(batch, tokens, heads, head_dim).to(dtype)
    selected = torch.rand(batch, tokens, heads) < 0.5
    gates = torch.where(torch.rand(batch, tokens, heads) < 0.3, 1.0, torch.randn(batch, tokens, heads)).to(dtype)
    return by_token.transpose(1, 2), gates, selected


def expected(out, gates, selected):
    return torch.where(selected.transpose(1, 2)[..., None], out * gates.transpose(1, 2)[..., None], 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [{}, {"batch": 1, "tokens": 1}, {"head_dim": 1}, {"heads": 1, "head_dim": 129}])
@pytest.mark.parametrize("contiguous", [False, True])
def test_the_same_as_where(dtype, shape, contiguous):
    cpu.available()
    out, gates, selected = arguments(dtype, **shape)
    out = out.contiguous() if contiguous else out
    want = expected(out, gates, selected)
    got = out.clone(memory_format=torch.preserve_format)
    assert gate_heads_(got, gates, selected) is got, "in place"
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_nan_of_a_skipped_head_is_zero_and_of_a_selected_one_stays():
    out, gates, selected = arguments(torch.float32)
    got = gate_heads_(torch.full_like(out, torch.nan), gates, selected)
    assert got.isnan().equal(selected.transpose(1, 2)[..., None].expand_as(got))
    assert (got.nan_to_num() == 0).all()


def test_where_the_operator_cannot_be_taken_pytorch_is():
    out, gates, selected = arguments(torch.float32)
    odd = torch.randn(2, 5, 197, 48)[..., ::2]
    for states, factors in ((out.double(), gates.double()), (odd, gates), (out, gates.bfloat16())):
        assert not can_gate(states, factors, selected)
        want = expected(states, factors, selected)
        torch.testing.assert_close(gate_heads_(states.clone(), factors, selected), want)


def test_shapes_that_do_not_fit_are_refused():
    if not cpu.available()[0]:
        pytest.skip("no kernel here")
    out, gates, selected = arguments(torch.float32)
    with pytest.raises(RuntimeError, match="the gates and the selection do not fit"):
        gate_heads_(out, gates[:, 1:], selected)
