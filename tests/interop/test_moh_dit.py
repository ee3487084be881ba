"""MoH-DiT and dense DiT of the official code: the golden case, and what does not fit."""

import pytest
import torch

from mixhead.interop import from_official

OUTPUT = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("impl", ["auto", "reference", "gathered", "cpu"])
def test_golden_case(golden, impl):
    case = golden("moh_dit_model")
    model = from_official("moh_dit", case.config, case.state_dict)
    with torch.no_grad():
        output, routings = model(case["x"], case["t"], case["y"], return_routing=True, impl=impl)
    torch.testing.assert_close(output, case["out"], **OUTPUT)
    assert [routing.selected_BNH.shape[-1] for routing in routings] == case.config["num_heads"]


def test_golden_guidance(golden):
    case = golden("moh_dit_model")
    model = from_official("moh_dit", case.config, case.state_dict)
    with torch.no_grad():
        guided = model.forward_with_cfg(case["cfg_x"], case["cfg_t"], case["cfg_y"], case.entry["cfg_scale"])
    torch.testing.assert_close(guided, case["cfg_out"], **OUTPUT)


def test_position_embedding_is_the_published_one(golden):
    case = golden("moh_dit_model")
    model = from_official("moh_dit", case.config, case.state_dict)
    published = model.pos_embed.detach().clone()
    model.reset_parameters()
    torch.testing.assert_close(model.pos_embed, published, **OUTPUT)
