"""The convolutional GLU: the kernel computes what plain PyTorch computes, output and gradients."""

import math
from dataclasses import replace

import pytest
import torch

from mixhead.errors import MixheadError
from mixhead.ops import GLU_IMPLEMENTATIONS, convolutional_glu, cpu, explain_glu

BUILT, WHY_NOT = cpu.available("convolutional_glu")
needs_kernel = pytest.mark.skipif(not BUILT, reason=WHY_NOT)


def inputs(size=(5, 6), channels=7, batch=2, dtype=torch.float64, requires_grad=False):
    """Random arguments in the order of the operator."""
    shapes = (batch, math.prod(size), 2 * channels), (2 * channels,), (channels, 3, 3), (channels,)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) for shape in shapes]


def results(tensors, size, impl, grad):
    """Output and the gradients of all inputs."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out = convolutional_glu(*tensors, size=size, impl=impl)
    return out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))


@needs_kernel
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (14, 14), (1, 13), (20, 2), (3, 4)])
@pytest.mark.parametrize("channels", [1, 16, 33, 150])  # part of a vector, whole ones, several tasks of an image
def test_the_kernel_against_double_precision(size, channels):
    exact = inputs(size, channels)
    grad = torch.randn(2, math.prod(size), channels, dtype=torch.float64)
    expected = results(exact, size, "reference", grad)
    found = results([tensor.float() for tensor in exact], size, "cpu", grad)
    for name, ours, reference in zip(("out", "hidden", "bias", "weight", "conv_bias"), found, expected, strict=True):
        scale = float(reference.abs().max()) + 1e-3
        torch.testing.assert_close(
            ours.double(), reference, rtol=0, atol=2e-6 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("impl", GLU_IMPLEMENTATIONS)
def test_bfloat16_stays_close_to_double(impl):
    """Hidden states in half precision, parameters in either, as autocast and a cast model have them."""
    exact = inputs((6, 7), 40)
    expected = convolutional_glu(*exact, size=(6, 7), impl="reference")
    for dtype in (torch.float32, torch.bfloat16):
        mixed = [exact[0].bfloat16(), *(parameter.to(dtype) for parameter in exact[1:])]
        found = results(mixed, (6, 7), impl, torch.ones(2, 42, 40))
        assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, dtype, dtype, dtype]
        assert (found[0].double() - expected).abs().mean() < 0.02 * expected.abs().mean()


def test_gradients_in_double_precision():
    tensors = inputs((2, 3), 2, batch=1, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: convolutional_glu(*t, size=(2, 3)), tensors, fast_mode=True)


def test_two_tokens_by_hand():
    """One channel, two columns: the middle tap and the one to its right."""
    weight = torch.zeros(1, 3, 3)
    weight[0, 1, 1], weight[0, 1, 2] = 2.0, 1.0
    hidden = torch.tensor([[[1.0, 10.0], [3.0, 20.0]]])
    out = convolutional_glu(hidden, torch.tensor([0.5, 1.0]), weight, torch.tensor([0.25]), size=(1, 2))
    gate = torch.nn.functional.gelu(torch.tensor([2 * 1.5 + 3.5 + 0.25, 2 * 3.5 + 0.25]))
    torch.testing.assert_close(out[0, :, 0], gate * torch.tensor([11.0, 21.0]))


@needs_kernel
def test_the_activation_at_its_ends():
    """Where the gate is far from 0, GELU is 0 or the gate itself, its derivative 0 or 1; NaN stays NaN."""
    gates = torch.cat([torch.linspace(-9, 9, 4001), torch.tensor([-1e30, -50.0, 0.0, 50.0, 1e30])])
    hidden = torch.stack([gates, torch.ones_like(gates)], -1).unsqueeze(0)
    weight = torch.zeros(1, 3, 3)
    weight[0, 1, 1] = 1.0
    tensors = hidden, torch.zeros(2), weight, torch.zeros(1)
    grad, size = torch.ones(1, len(gates), 1), (1, len(gates))
    found = results(tensors, size, "cpu", grad)
    expected = results([tensor.double() for tensor in tensors], size, "reference", grad)
    for ours, reference in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-6, atol=1e-6)
    hidden[0, 7, 0] = torch.nan
    out = convolutional_glu(*tensors, size=size, impl="cpu")
    assert out[0, 7, 0].isnan()
    assert out[0, 9:, 0].isfinite().all()


@needs_kernel
def test_gradients_do_not_depend_on_the_threads():
    tensors = [tensor.float() for tensor in inputs((9, 9), 200, batch=3)]
    grad = torch.randn(3, 81, 200)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(tensors, (9, 9), "cpu", grad)
        torch.set_num_threads(3)
        together = results(tensors, (9, 9), "cpu", grad)
    finally:
        torch.set_num_threads(threads)
    assert all(a.equal(b) for a, b in zip(alone, together, strict=True))


@needs_kernel
def test_the_kernel_is_a_proper_operator():
    tensors = [tensor.float().requires_grad_() for tensor in inputs((3, 4), 6)]
    torch.library.opcheck(torch.ops.mixhead.convolutional_glu_cpu.default, (*tensors, 3), atol=1e-4, rtol=1e-3)


@needs_kernel
def test_layouts():
    """Any strides of the hidden states, and an expanded gradient."""
    hidden, *parameters = (tensor.float() for tensor in inputs((5, 6), 7))
    turned = hidden.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    out = convolutional_glu(turned, *parameters, size=(5, 6), impl="cpu")
    torch.testing.assert_close(out, convolutional_glu(hidden, *parameters, size=(5, 6), impl="cpu"))
    out.sum().backward()
    assert turned.grad.isfinite().all()


@needs_kernel
def test_the_kernel_takes_what_auto_gives_it(monkeypatch):
    calls = []
    counted = replace(GLU_IMPLEMENTATIONS["cpu"], run=lambda *a: calls.append(a) or a[0])
    monkeypatch.setitem(GLU_IMPLEMENTATIONS, "cpu", counted)
    convolutional_glu(*(tensor.float() for tensor in inputs()), size=(5, 6))
    assert len(calls) == 1
    convolutional_glu(*inputs(), size=(5, 6))  # in double precision
    convolutional_glu(*(tensor.float() for tensor in inputs(batch=0)), size=(5, 6))
    assert len(calls) == 1
    assert explain_glu(inputs(dtype=torch.float32)[0]).impl == "cpu"
    assert "not torch.float64" in explain_glu(inputs()[0]).reason


@pytest.mark.parametrize(
    ("position", "change", "sentence"),
    [
        (0, torch.zeros(2, 29, 14), r"hidden_BNK must be \[2, 30, 14\] for 7 channels and a map of 5 x 6, got"),
        (0, torch.zeros(30, 14), "hidden_BNK must be .batch, tokens, 2 channels."),
        (1, torch.zeros(7), r"bias_K must be \[14\]"),
        (2, torch.zeros(7, 1, 3, 3), r"weight_M33 must be \[7, 3, 3\] .* got \[7, 1, 3, 3\]"),
    ],
)
def test_arguments_that_do_not_fit(position, change, sentence):
    arguments = inputs()
    arguments[position] = change
    with pytest.raises(MixheadError, match=sentence):
        convolutional_glu(*arguments, size=(5, 6))


def test_an_unknown_implementation():
    with pytest.raises(MixheadError, match="impl='fast' is unknown: choose 'auto' or one of reference, cpu"):
        convolutional_glu(*inputs(), size=(5, 6), impl="fast")
