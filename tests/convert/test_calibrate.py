"""Calibration: what it chooses on models where the right choice is known, and what it leaves alone."""

import itertools
import logging
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import ZOO, tokens

import mixhead
from mixhead import CalibrationConfig, MixheadError, MoHConfig
from mixhead.convert.budget import share_out
from mixhead.convert.calibration import Calibration
from mixhead.convert.statistics import LossSums, ScoreSums, Statistics
from mixhead.convert.target import ConvertedModel
from mixhead.models.hugging_face import find_sites
from mixhead.routing import LayerHeads, top_k_mask

CALIBRATABLE = [name for name in ZOO if name != "gemma2-capped"]


def converted(name="llama", config=None):
    model = ZOO[name].make()
    return mixhead.convert(model, config or MoHConfig(active_heads=3, shared_heads=1))


def batches(count=3):
    return [torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def total_active(model):
    return sum(layer["active_heads"] for layer in model.config.moh["layers"])


@pytest.mark.parametrize("name", CALIBRATABLE)
def test_every_architecture_calibrates_and_keeps_its_number_of_heads(name):
    model = converted(name, MoHConfig(active=0.75, shared=0.25))
    before = total_active(model)
    report = mixhead.calibrate(model, [ZOO[name].inputs()] * 2)
    assert total_active(model) == before
    assert len(report.layers) == len(model.config.moh["layers"])
    outputs = model(**ZOO[name].inputs())
    assert torch.isfinite(getattr(outputs, ZOO[name].answer)).all()


@pytest.mark.parametrize("layers", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_share_of_heads_that_was_asked_for_is_kept_however_few_layers_there_are(layers, share, caplog):
    """The first layer keeps all of its heads where the others can make up for it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers))
    mixhead.convert(model, MoHConfig(active=share))
    with caplog.at_level(logging.INFO, "mixhead"):
        report = mixhead.calibrate(model, batches(1))
    assert report.active_share == share == total_active(model) / (4 * layers)
    keeps_all = report.layers[0].active_heads == 4
    assert keeps_all is (share == 0.75 and layers > 1)
    assert ("Only 0 of the first 1 layers keep all heads" in caplog.text) is not keeps_all


def test_layers_of_different_steps_keep_their_number_of_heads():
    """Groups of four and of three heads: no single layer can make up for what another one has too many."""
    model = converted(config=MoHConfig(active_heads=3, shared_heads=0))
    calibration = Calibration(
        ConvertedModel(model), [{"input_ids": ids} for ids in batches(1)], CalibrationConfig(), None
    )
    calibration.heads = [LayerHeads(8, 4, 0), LayerHeads(6, 3, 0)]
    names = [site.name for site in calibration.sites]
    counts = dict(zip(names, ([4], [3]), strict=True))
    losses = dict(zip(names, ({4: 1.0}, {3: 1.0}), strict=True))
    calibration.probe_heads = lambda: calibration.heads
    for sensitivity in ({names[0]: 1.0, names[1]: 2.0}, {names[0]: 2.0, names[1]: 1.0}, {}):
        chosen = calibration.budget(counts, losses, sensitivity)
        assert [heads.active_heads for heads in chosen] == [4, 3]


def test_the_loudest_head_becomes_the_shared_one():
    model = converted()
    for site, loud in zip(find_sites(model), (2, 3), strict=True):
        with torch.no_grad():
            site.output_weight_HDC()[loud].mul_(50.0)
    report = mixhead.calibrate(model, batches(), CalibrationConfig(budget="uniform"))
    assert [layer.shared_heads for layer in report.layers] == [(2,), (3,)]
    assert [m.shared_H.tolist() for m in model.modules() if hasattr(m, "shared_H")] == [
        [False, False, True, False],
        [False, False, False, True],
    ]


def test_a_head_that_contributes_nothing_is_the_one_that_is_skipped():
    model = converted(config=MoHConfig(active_heads=3, shared_heads=0))
    for site in find_sites(model):
        with torch.no_grad():
            site.output_weight_HDC()[1].mul_(1e-6)
    report = mixhead.calibrate(model, batches(), CalibrationConfig(budget="uniform"))
    with mixhead.keep_routing(model) as log:
        model(input_ids=tokens())
    assert all(load[1] == 0.0 and load.sum() == 3.0 for load in log.load().values())
    assert all(layer.expected_loss < 1e-6 for layer in report.layers)


def test_fitted_routers_lose_less_than_other_choices_of_as_many_heads():
    """Energy lost on text that was not fitted."""
    model = converted(config=MoHConfig(active_heads=2, shared_heads=0))
    with torch.no_grad():  # sharp attention, so that heads differ from token to token
        for site in find_sites(model):
            site.module.q_proj.weight.mul_(200.0)
    mixhead.calibrate(model, batches(40), CalibrationConfig(budget="uniform", refit_output=False))
    sites, held_out = find_sites(model), tokens(8, 12)
    means = {site.name: site.module.moh_skipped.detach() for site in sites}
    counts = {site.name: [2] for site in sites}
    routers = {site.name: site.module.moh_router for site in sites}

    def lost(select):
        trace = LossSums(sites, counts, {site.name: partial(select, site.name) for site in sites}, means)
        with torch.no_grad():
            ConvertedModel(model).observe({"input_ids": held_out}, trace)
        return sum(float(trace.lost[site.name] / trace.total[site.name]) for site in sites)

    fitted = lost(lambda name, hidden, k: top_k_mask(routers[name].score_proj(hidden), k))
    randomly = [lost(lambda name, hidden, k: top_k_mask(torch.rand(len(hidden), 4), k)) for _ in range(5)]
    assert fitted < min(randomly)


def test_scores_solve_the_ridge_regression_that_they_claim_to():
    model = converted()
    model.eval()
    sites, data = find_sites(model), batches()
    means = {site.name: torch.zeros(4, 8) for site in sites}
    trace, seen = ScoreSums(sites, means), {}
    with torch.no_grad():
        for ids in data:
            ConvertedModel(model).observe({"input_ids": ids}, trace)
            ConvertedModel(model).observe({"input_ids": ids}, _Keep(seen))
    for site in sites:
        hidden = torch.cat([h for h, _ in seen[site.name]]).double()
        heads = torch.cat([o for _, o in seen[site.name]]).double()
        inputs = torch.cat([hidden, torch.ones(len(hidden), 1)], 1)
        norms = torch.einsum("xhd,hdc->xhc", heads, site.output_weight_HDC().detach().double()).norm(dim=-1)
        strength = 1e-2 * (inputs.T @ inputs).diagonal().mean()
        padded = torch.cat([inputs, strength.sqrt() * torch.eye(33)])
        expected = torch.linalg.lstsq(padded, torch.cat([norms.log(), torch.zeros(33, 4)])).solution
        fit = trace.fit(site.name, 1e-2)
        torch.testing.assert_close(fit.weight_HC.double(), expected[:-1].T, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(fit.bias_H.double(), expected[-1], atol=1e-4, rtol=1e-3)


class _Keep(Statistics):
    def __init__(self, seen):
        self.seen = seen

    def see(self, name, hidden_XC, heads_XHD):
        self.seen.setdefault(name, []).append((hidden_XC, heads_XHD))


def test_statistics_do_not_grow_with_the_tokens():
    model = converted()
    sites = find_sites(model)
    trace = ScoreSums(sites, {site.name: torch.zeros(4, 8) for site in sites})
    sizes = []
    with torch.no_grad():
        for count in (1, 5):
            for ids in batches(count):
                ConvertedModel(model).observe({"input_ids": ids}, trace)
            kept = (trace.gram, trace.cross, trace.norms)
            sizes.append(sum(tensor.numel() for sums in kept for tensor in sums.values()))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    ids = tokens(1, 10)
    padding = torch.zeros(1, 4, dtype=torch.long)
    parts = [padding, ids] if side == "left" else [ids, padding]
    padded = {
        "input_ids": torch.cat(parts, 1),
        "attention_mask": torch.cat([torch.zeros_like(p) if p is padding else torch.ones_like(p) for p in parts], 1),
    }
    model = converted()
    sites = find_sites(model)
    sums = []
    for batch in ({"input_ids": ids}, padded):
        trace = ScoreSums(sites, {site.name: torch.zeros(4, 8) for site in sites})
        with torch.no_grad():
            ConvertedModel(model).observe(batch, trace)
        sums.append([tensor for kept in (trace.gram, trace.cross, trace.norms) for tensor in kept.values()])
    for plain, with_padding in zip(*sums, strict=True):
        torch.testing.assert_close(plain, with_padding, atol=1e-4, rtol=1e-4)


def test_the_uniform_budget_leaves_every_layer_as_configured():
    model = converted()
    mixhead.calibrate(model, batches(), CalibrationConfig(budget="uniform"))
    assert [layer["active_heads"] for layer in model.config.moh["layers"]] == [3, 3]


def test_the_sensitivity_budget_moves_heads_to_where_they_matter():
    """With the first layer's heads almost silenced, its share goes to the second."""
    model = converted(config=MoHConfig(active_heads=2, shared_heads=0))
    with torch.no_grad():
        find_sites(model)[0].output_projection.weight.mul_(1e-4)
    mixhead.calibrate(model, batches(), CalibrationConfig(dense_layers=0, least_share=0.0))
    first, second = (layer["active_heads"] for layer in model.config.moh["layers"])
    assert first < second and first + second == 4


def test_group_balance_survives_calibration():
    model = converted(config=MoHConfig(active_heads=2, shared_heads=0, group_balanced=True))
    mixhead.calibrate(model, batches())
    with mixhead.keep_routing(model) as log:
        model(input_ids=tokens())
    for _, routing in log.layers:
        counts = routing.selected_BNH.unflatten(-1, (2, 2)).sum(-1)
        assert (counts == counts[..., :1]).all()


def test_a_calibrated_model_survives_saving(tmp_path):
    model = converted(config=MoHConfig(active_heads=2, shared_heads=1))
    mixhead.calibrate(model, batches(), CalibrationConfig(dense_layers=0))
    mixhead.save(model, None, tmp_path / "model")
    again = mixhead.load(tmp_path / "model").eval()
    assert torch.equal(again(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_calibration_restores_training_mode_and_leaves_no_gradients():
    model = converted().train()
    mixhead.calibrate(model, batches(1))
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_reaches_its_end():
    steps = []
    mixhead.calibrate(converted(), batches(), on_progress=lambda done, total: steps.append((done, total)))
    assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
    assert steps[-1][0] == steps[-1][1]


def test_nan_in_the_hidden_states_is_named():
    model = converted()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(torch.nan)
    with pytest.raises(MixheadError, match=r"layers\.1\.self_attn .*NaN or infinity"):
        mixhead.calibrate(model, batches())


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (lambda: ZOO["llama"].make(), batches(1), "convert the model"),
        (
            lambda: converted(config=MoHConfig(active_heads=3, shared_heads=1, router="query_norm")),
            batches(1),
            "linear",
        ),
        (lambda: converted(), [], "at least one"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(model, data, message):
    with pytest.raises(MixheadError, match=message):
        mixhead.calibrate(model(), data)


def test_a_budget_is_shared_out_as_well_as_an_exhaustive_search_does_for_convex_costs():
    costs = [{3: 0.0, 2: 1.0, 1: 4.0}, {3: 0.0, 2: 0.5, 1: 1.5}, {3: 0.0, 2: 3.0, 1: 9.0}]
    for total in range(3, 10):
        chosen = share_out(costs, total)
        best = min(
            (sum(cost[k] for cost, k in zip(costs, ks, strict=True)), ks)
            for ks in itertools.product((1, 2, 3), repeat=3)
            if sum(ks) == total
        )
        assert sum(chosen) == total
        assert sum(cost[k] for cost, k in zip(costs, chosen, strict=True)) == best[0]


def test_a_budget_below_what_the_layers_allow_stops_there():
    assert share_out([{4: 0.0, 2: 1.0}, {4: 0.0}], 5) == [2, 4]
    assert share_out([{4: 0.0, 2: 1.0}], 3) == [4]  # one step too many would fall below
