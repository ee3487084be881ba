"""Attention modules of the official MoA: outputs within 1e-5, gradients within 1e-4, in every implementation."""

import pytest
import torch

from mixhead.errors import MixheadError
from mixhead.interop import from_official
from mixhead.interop.moa import rename_moa_attention
from mixhead.ops import IMPLEMENTATIONS

CASES = [f"moa_attention_{i}" for i in range(3)]
OUTPUT, GRADIENT = {"rtol": 0, "atol": 1e-5}, {"rtol": 0, "atol": 1e-4}
# The others need a GPU or an environment of their own; tests/ops has them.
ENGINES = ["auto", *(name for name in IMPLEMENTATIONS if name not in ("slots", "triton", "flex"))]


def arguments(case):
    """The inputs of a case, batch first, as a caller would give them."""
    return {
        "query": case["query"].transpose(0, 1),
        "key_value": case["key_value"].transpose(0, 1) if case.config["cross_attention"] else None,
        "query_padding_mask": case["query_padding_mask"],
        "key_padding_mask": case["key_padding_mask"],
        "attn_mask": case.tensors.get("attn_mask"),
    }


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_golden_case(golden, name, impl):
    case = golden(name)
    layer = from_official("moa_attention", case.config, case.state_dict)
    y_BNC, routing = layer(**arguments(case), return_routing=True, impl=impl)
    torch.testing.assert_close(y_BNC.transpose(0, 1), case["y"], **OUTPUT)
    torch.testing.assert_close(routing.aux_loss, case["aux"].squeeze(), **OUTPUT)

    ((y_BNC.transpose(0, 1) * case["dy"]).sum() + routing.aux_loss).backward()
    expected = rename_moa_attention(case.gradients)
    actual = {parameter: tensor.grad for parameter, tensor in layer.named_parameters()}
    assert actual.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(actual[parameter], gradient, **GRADIENT, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_the_causal_flag_is_the_causal_mask(golden, name):
    case = golden(name)
    layer = from_official("moa_attention", case.config, case.state_dict)
    given = {**arguments(case), "key_value": None, "key_padding_mask": case["query_padding_mask"]}
    tokens = given["query"].shape[1]
    given["attn_mask"] = torch.full((tokens, tokens), -torch.inf).triu(1)
    masked, _ = layer(**given)
    flagged, _ = layer(**{**given, "attn_mask": None}, causal=True)
    torch.testing.assert_close(flagged, masked)


def test_double_precision_weights_stay_double(golden):
    case = golden(CASES[0])
    layer = from_official("moa_attention", case.config, {k: v.double() for k, v in case.state_dict.items()})
    given = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in arguments(case).items()}
    y_BNC, routing = layer(**given)
    assert y_BNC.dtype == routing.aux_loss.dtype == torch.float64
    torch.testing.assert_close(y_BNC.transpose(0, 1).float(), case["y"], **OUTPUT)


def test_noisy_weights_make_a_noisy_router(golden):
    case = golden(CASES[0])
    weights = {**case.state_dict, "q_proj.w_noise": torch.zeros(32, 6)}
    layer = from_official("moa_attention", case.config, weights)
    first, second = (layer(case["query"])[1].logits_BNE for _ in range(2))
    assert not first.equal(second)
    layer.eval()
    torch.testing.assert_close(layer(**arguments(case))[0].transpose(0, 1), case["y"], **OUTPUT)


def test_what_does_not_fit_is_named(golden):
    case = golden(CASES[0])
    without = {k: v for k, v in case.state_dict.items() if k != "q_proj.w_gate"}
    with pytest.raises(MixheadError, match=r"missing \['router.gate_proj.weight'\], unexpected none"):
        from_official("moa_attention", case.config, without)
    with pytest.raises(MixheadError, match=r"gate_proj.weight must be \[7, 32\], but it is \[6, 32\]"):
        from_official("moa_attention", {**case.config, "num_experts": 7}, case.state_dict)
    with pytest.raises(MixheadError, match=r"k_proj.weight and v_proj.weight must have one shape"):
        from_official("moa_attention", case.config, {**case.state_dict, "k_proj.weight": torch.zeros(8, 31)})
    with pytest.raises(MixheadError, match="top_k=9 must be at least 1 and at most num_experts=6"):
        from_official("moa_attention", {**case.config, "top_k": 9}, case.state_dict)
    with pytest.raises(MixheadError, match="loss_weights names entropy"):
        from_official("moa_attention", {**case.config, "loss_weights": {"entropy": 1.0}}, case.state_dict)
