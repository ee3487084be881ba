"""One attention layer of the official MoH-DiT: outputs within 1e-5, gradients within 1e-4, in every implementation."""

import pytest
import torch

from mixhead import interop
from mixhead.errors import MixheadError
from mixhead.interop.dit import rename_attention
from mixhead.interop.official import from_official
from mixhead.ops import IMPLEMENTATIONS

CASES = [f"moh_dit_attention_{i}" for i in range(5)]
OUTPUT, GRADIENT = {"rtol": 0, "atol": 1e-5}, {"rtol": 0, "atol": 1e-4}

# The others refuse some of these cases; tests/ops has them.
ENGINES = ["auto", *(name for name in IMPLEMENTATIONS if name not in ("slots", "triton", "flex"))]


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_golden_case(golden, name, impl):
    case = golden(name)
    layer = interop.from_official("moh_dit_attention", case.config, case.state_dict)
    x_BNC = case["x"].requires_grad_()
    y_BNC, routing = layer(x_BNC, return_routing=True, impl=impl)
    torch.testing.assert_close(y_BNC, case["y"], **OUTPUT)
    torch.testing.assert_close(routing.balance_loss, case["aux"].squeeze(), **OUTPUT)

    ((y_BNC * case["dy"]).sum() + 0.01 * routing.balance_loss).backward()
    gradients = case.gradients
    torch.testing.assert_close(x_BNC.grad, gradients.pop("x"), **GRADIENT)
    # The official gradient of `qkv` is cut as its weight is: into those of q_proj, k_proj and v_proj.
    expected = rename_attention(gradients)
    actual = {parameter: tensor.grad for parameter, tensor in layer.named_parameters()}
    assert actual.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(actual[parameter], gradient, **GRADIENT, msg=lambda m, p=parameter: f"{p}: {m}")


def test_double_precision_weights_stay_double(golden):
    case = golden(CASES[0])
    layer = from_official("moh_dit_attention", case.config, {k: v.double() for k, v in case.state_dict.items()})
    assert layer(case["x"].double()).dtype == torch.float64


def test_a_layer_without_bias_in_qkv(golden):
    case = golden(CASES[0])
    weights = {k: v for k, v in case.state_dict.items() if k != "qkv.bias"}
    assert from_official("moh_dit_attention", case.config, weights).q_proj.bias is None


def test_the_layer_owns_its_weights(golden):
    case = golden(CASES[0])
    weights = case.state_dict
    layer = from_official("moh_dit_attention", case.config, weights)
    before = layer(case["x"])
    for tensor in weights.values():
        tensor.zero_()
    assert layer(case["x"]).equal(before)


def test_weights_that_do_not_fit_are_named(golden):
    case = golden(CASES[0])
    weights = case.state_dict
    without = {k: v for k, v in weights.items() if k != "wg_0.weight"}
    with pytest.raises(MixheadError, match=r"missing \['router.stage_proj.weight'\], unexpected none"):
        from_official("moh_dit_attention", case.config, without)
    with pytest.raises(MixheadError, match=r"missing none, unexpected \['wg_2.weight'\]"):
        from_official("moh_dit_attention", case.config, {**weights, "wg_2.weight": torch.ones(1)})
    with pytest.raises(MixheadError, match=r"router.routed_proj.weight must be \[2, 32\], but it is \[3, 32\]"):
        from_official("moh_dit_attention", case.config, {**weights, "wg.weight": torch.ones(3, 32)})
    with pytest.raises(MixheadError, match="shared_heads=9 and top_k=1 do not fit into num_heads=4"):
        from_official("moh_dit_attention", {**case.config, "shared_heads": 9}, weights)


def test_an_unknown_kind_is_answered_with_the_known_ones():
    with pytest.raises(MixheadError, match=r"kind='moh_rnn' is unknown: choose one of .*moh_dit_attention"):
        from_official("moh_rnn", {}, {})
