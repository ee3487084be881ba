"""Output projections fitted to the heads that are left: what they solve, what they gain, what they leave alone."""

import copy

import pytest
import torch
from zoo import ZOO, tokens

import mixhead
from mixhead import CalibrationConfig, MoHConfig
from mixhead.convert.refit import OutputSums
from mixhead.convert.statistics import Statistics
from mixhead.convert.target import ConvertedModel
from mixhead.models.hugging_face import find_sites
from mixhead.modes import evaluation_mode

UNIFORM = CalibrationConfig(budget="uniform", refit_output=False)


def calibrated(name="llama", active_heads=2):
    """A model with fitted routers whose output projections are still the original ones."""
    model = mixhead.convert(ZOO[name].make(), MoHConfig(active_heads=active_heads))
    mixhead.calibrate(model, batches(name), UNIFORM)
    return model


def batches(name="llama", count=12):
    if name != "llama":
        return [ZOO[name].inputs()] * 2
    return [torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def observe(model, data, statistics):
    with evaluation_mode(model), torch.no_grad():
        for ids in data:
            ConvertedModel(model).observe({"input_ids": ids}, statistics)
    return statistics


def sums(model, data):
    subject = ConvertedModel(model)
    return observe(model, data, OutputSums({site: subject.routing_of(site) for site in subject.sites}))


def weights(model):
    return {site.name: site.output_weight_YC().detach().clone() for site in find_sites(model)}


def test_it_solves_the_regression_that_it_claims_to():
    model = calibrated()
    site = find_sites(model)[0]
    trace, seen = sums(model, batches()), []

    class Keep(Statistics):
        def see(self, name, hidden_XC, heads_XHD):
            if name == site.name:
                selected = site.module.moh_router(hidden_XC[None], None, None).selected_BNH[0]
                seen.append((torch.where(selected[..., None], heads_XHD, site.module.moh_skipped), heads_XHD))

    observe(model, batches(), Keep())
    filled, heads = (torch.cat(parts).flatten(1).double() for parts in zip(*seen, strict=True))
    before = site.output_weight_YC().detach().double()
    strength = 1e-2 * filled.square().sum(0).mean()
    # |z (W_O + d) - y|^2 + strength |d|^2 as one least-squares problem in d.
    rows = torch.cat([filled, strength.sqrt() * torch.eye(filled.shape[1])])
    wanted = torch.cat([(heads - filled) @ before, torch.zeros_like(before)])
    expected = before + torch.linalg.lstsq(rows, wanted).solution
    lost = trace.refit(site, 1e-2)
    torch.testing.assert_close(site.output_weight_YC().double(), expected, atol=1e-5, rtol=1e-4)
    left = (filled @ expected - heads @ before).square().sum() / (heads @ before).square().sum()
    assert lost == pytest.approx(float(left), rel=1e-3)


def test_a_skipped_head_that_another_head_repeats_is_not_missed():
    model = ZOO["llama"].make()
    with torch.no_grad():  # heads 0 and 1 have the same queries; they share their keys and values
        for site in find_sites(model):
            q_HDC = site.module.q_proj.weight.unflatten(0, (4, -1))
            q_HDC[1] = q_HDC[0]
    mixhead.convert(model, MoHConfig(active_heads=3))
    mixhead.calibrate(model, batches(), UNIFORM)
    for site in find_sites(model):
        with torch.no_grad():  # every token skips head 1
            site.module.moh_router.score_proj.weight.zero_()
            site.module.moh_router.score_proj.bias.copy_(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    trace = sums(model, batches())
    assert all(trace.refit(site, 1e-9) < 1e-5 for site in find_sites(model))


def test_the_output_comes_closer_to_that_of_all_heads_on_other_text():
    model = calibrated()
    dense = mixhead.revert(copy.deepcopy(model))
    held_out = tokens(8, 12)
    with torch.no_grad():
        wanted = dense(input_ids=held_out).logits
        before = (model(input_ids=held_out).logits - wanted).square().mean()
        trace = sums(model, batches(count=40))
        for site in find_sites(model):
            trace.refit(site, 1e-3)
        after = (model(input_ids=held_out).logits - wanted).square().mean()
    assert after < 0.9 * before


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "dinov2"])
def test_calibrate_does_it_where_heads_are_skipped_and_nowhere_else(name):
    """Among them layers with a bias, with the transposed weight of GPT-2, and in a sibling module."""
    active = [ZOO[name].make().config.num_attention_heads, 2]
    model = mixhead.convert(ZOO[name].make(), MoHConfig(active_heads=active))
    before, data = weights(model), batches(name)
    mixhead.calibrate(model, data, CalibrationConfig(budget="uniform", refit_output=False))
    assert all(torch.equal(before[layer], after) for layer, after in weights(model).items())
    report = mixhead.calibrate(model, data, CalibrationConfig(budget="uniform"))
    first, second = weights(model)
    assert torch.equal(before[first], weights(model)[first])
    assert not torch.equal(before[second], weights(model)[second])
    assert report.layers[0].expected_loss == 0.0 <= report.layers[1].expected_loss < 1.0


@pytest.mark.parametrize("weight", ["v_proj", "o_proj"])
def test_a_layer_of_zeros_stays_one(weight):
    model = ZOO["llama"].make()
    for layer in model.model.layers:
        getattr(layer.self_attn, weight).weight.data.zero_()
    expected = model(tokens()).logits
    mixhead.calibrate(mixhead.convert(model, MoHConfig(active=0.5)), [tokens()])
    torch.testing.assert_close(model(tokens()).logits, expected)
