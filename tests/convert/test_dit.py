"""A dense DiT as mixture-of-head: identity, calibration over time steps, and back."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import mixhead
from mixhead.convert import CalibrationConfig, MoHConfig, noised_batches
from mixhead.errors import MixheadError
from mixhead.models.moh_dit import MoHDiT, MoHDiTConfig

SIZES = {
    "sample_size": 8, "in_channels": 3, "hidden_size": 48, "depth": 3, "num_heads": 6, "num_classes": 4,
}  # fmt: skip


def dense(seed=0):
    """Heads with sharp attention and of different weight, so that they differ from token to token."""
    torch.manual_seed(seed)
    model = MoHDiT(MoHDiTConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.08)
        for _, attention in model.named_attention():
            attention.q_proj.weight.mul_(8.0)
    return model


def batches(count, seed=0, **keywords):
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(8 * count, 3, 8, 8, generator=generator).clamp(-1, 1)
    classes = torch.randint(4, (8 * count,), generator=generator)
    return list(noised_batches(samples, classes, 4, seed=seed, **keywords))


def distance(model, reference, held_out):
    """Relative squared error of the model's output on batches that were not fitted."""
    with torch.no_grad():
        pairs = [(model(**batch), reference(**batch)) for batch in held_out]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


def test_all_heads_active_is_the_same_model():
    model = mixhead.convert(dense(), MoHConfig(active=1.0))
    (batch,) = batches(1)
    assert model(**batch).equal(dense()(**batch))
    assert not any(model.config.routes)
    two_stage = mixhead.convert(dense(), MoHConfig(active=1.0, shared=0.5, router="two_stage"))
    torch.testing.assert_close(two_stage(**batch), dense()(**batch), rtol=0, atol=1e-5)


def patterns(count, seed):
    """Stripes, columns, diagonals and rings of random width and phase: [count, 1, 8, 8] and their classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(4, (count,), generator=generator)
    phase, width = (torch.rand(count, 1, 1, generator=generator) for _ in range(2))
    rows, columns = torch.arange(8.0).view(1, 8, 1).expand(1, 8, 8), torch.arange(8.0).view(1, 1, 8).expand(1, 8, 8)
    rings = ((rows - 3.5).square() + (columns - 3.5).square()).sqrt()
    distance = torch.cat([rows, columns, rows + columns, rings])[classes]
    return torch.sin((width + 0.5) * distance + 6.3 * phase).unsqueeze(1), classes


@pytest.fixture(scope="module")
def trained():
    """A small DiT that has learned these patterns for two seconds: in random weights no head knows more."""
    torch.manual_seed(0)
    sizes = {**SIZES, "in_channels": 1, "learn_sigma": False}
    model = MoHDiT(MoHDiTConfig(**sizes))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    for step in range(150):
        images, classes = patterns(32, 1000 + step)
        t, noise = torch.randint(1000, (32,)), torch.randn_like(images)
        share = kept[t].view(-1, 1, 1, 1)
        loss = F.mse_loss(model(share.sqrt() * images + (1 - share).sqrt() * noise, t, classes), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_calibrated_routing_loses_less_than_other_choices(trained):
    """Of three heads of six: chosen by the fitted router and at random, both with the same stand-ins, and without any.

    Query norms are only compared without stand-ins: how well they choose in a model this small is luck.
    """
    fitted, held_out = list(noised_batches(*patterns(192, 1), 4)), list(noised_batches(*patterns(48, 2), 4, seed=1))

    def convert(router):
        return mixhead.convert(copy.deepcopy(trained), MoHConfig(active_heads=3, router=router))

    calibrated = convert("linear")
    config = CalibrationConfig(budget="uniform", refit_output=False)
    report = mixhead.calibrate(calibrated, fitted, config)
    assert report.tokens == 192 * 16
    assert report.active_share == calibrated.config.active_share == 0.5
    others = {name: convert(name) for name in ("linear", "query_norm")}
    errors = {f"{name}, no stand-ins": distance(model, trained, held_out) for name, model in others.items()}
    for (_, chance), (_, known) in zip(others["linear"].named_attention(), calibrated.named_attention(), strict=True):
        chance.skipped_HD = known.skipped_HD
    errors["linear"] = distance(others["linear"], trained, held_out)
    error = distance(calibrated, trained, held_out)
    assert error < 0.9 * errors["linear"], errors
    assert error < 0.5 * min(errors["linear, no stand-ins"], errors["query_norm, no stand-ins"]), errors
    refitted = convert("linear")
    mixhead.calibrate(refitted, fitted, replace(config, refit_output=True))
    assert distance(refitted, trained, held_out) < 0.8 * error


def test_heads_are_shared_out_by_sensitivity(tmp_path):
    model = mixhead.convert(dense(), MoHConfig(active_heads=4, shared_heads=1))
    steps = []
    report = mixhead.calibrate(
        model, batches(4), CalibrationConfig(probe_sequences=8), on_progress=lambda *s: steps.append(s)
    )
    active = [layer.active_heads for layer in report.layers]
    assert sum(active) == 12
    assert active[0] == 6
    assert [layer.active_heads for layer in model.config.layers] == active
    assert steps[-1][0] == steps[-1][1]
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from mixhead.models.moh_dit import MoHDiTTransformer2DModel, load_dit

    MoHDiTTransformer2DModel.from_dit(model).save_pretrained(tmp_path)
    again = load_dit(tmp_path)
    (batch,) = batches(1, seed=2)
    assert again.config == model.config
    torch.testing.assert_close(again(**batch), model(**batch), rtol=0, atol=1e-6)


def test_the_mean_of_a_skipped_head_stands_in():
    """Heads that put out the same for every token are not missed."""
    model = dense()
    with torch.no_grad():
        for _, attention in model.named_attention():
            attention.v_proj.weight.zero_()
    model = mixhead.convert(model, MoHConfig(active_heads=2))
    mixhead.calibrate(model, batches(2), CalibrationConfig(budget="uniform"))
    reference = dense()
    with torch.no_grad():
        for _, attention in reference.named_attention():
            attention.v_proj.weight.zero_()
    assert distance(model, reference, batches(1, seed=3)) < 1e-9


def test_gradients_reach_the_routers():
    model = mixhead.convert(dense(), MoHConfig(active_heads=3)).train()
    (batch,) = batches(1)
    model(**batch).square().mean().backward()
    for _, attention in model.named_attention():
        assert attention.router.score_proj.weight.grad.abs().sum() > 0


def test_and_back():
    model = mixhead.revert(mixhead.convert(dense(), MoHConfig(active_heads=3)))
    (batch,) = batches(1)
    assert model.config == dense().config
    assert model(**batch).equal(dense()(**batch))
    assert model.state_dict().keys() == dense().state_dict().keys()


def test_batches_are_noised_to_their_time_step():
    samples, classes = torch.zeros(4000, 1, 1, 1), torch.zeros(4000, dtype=torch.long)
    (batch,) = noised_batches(samples, classes, 9, batch_size=4000)
    early, late = batch["t"] < 50, batch["t"] > 950
    assert batch["x"][early].std() < 0.2
    assert 0.9 < batch["x"][late].std() < 1.1
    assert 0.07 < (batch["y"] == 9).float().mean() < 0.13
    (again,) = noised_batches(samples, classes, 9, batch_size=4000)
    assert all(again[name].equal(value) for name, value in batch.items())


def test_what_is_refused():
    model = mixhead.convert(dense(), MoHConfig(active_heads=3, router="query_norm"))
    with pytest.raises(MixheadError, match="mixture-of-head already: call"):
        mixhead.convert(model)
    with pytest.raises(MixheadError, match=r"fits the linear router"):
        mixhead.calibrate(model, batches(1))
    with pytest.raises(MixheadError, match="dense, so there is nothing to revert"):
        mixhead.revert(dense())
    with pytest.raises(MixheadError, match="Layer 0 has 6 heads, and active_heads=7 gives 7"):
        mixhead.convert(dense(), MoHConfig(active_heads=7))
    linear = mixhead.convert(dense(), MoHConfig(active_heads=3))
    with pytest.raises(MixheadError, match="NaN or infinity"):
        mixhead.calibrate(linear, [{**batches(1)[0], "x": torch.full((8, 3, 8, 8), torch.nan)}])
    with pytest.raises(MixheadError, match="a class number for each"):
        next(noised_batches(torch.zeros(2, 3, 8, 8), torch.zeros(3), 4))
