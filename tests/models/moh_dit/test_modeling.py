"""The network: routing as a value, gradients, checkpointing, guidance, and inputs that do not fit."""

import pytest
import torch
from torch.autograd import gradcheck

import mixhead
from mixhead.errors import MixheadError
from mixhead.models.moh_dit import MoHDiT, MoHDiTConfig
from mixhead.routing import mean_balance_loss

TINY = {
    "sample_size": 8, "in_channels": 4, "hidden_size": 48, "depth": 3, "num_heads": (2, 3, 4), "head_dim": 12,
    "num_classes": 5,
}  # fmt: skip
ROUTED = {**TINY, "shared_heads": (2, 1, 2), "top_k": (0, 1, 1)}


def make(**changes):
    """A model whose blocks are not the identity, as they are at the published initialisation."""
    model = MoHDiT(MoHDiTConfig(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


def batch(config, size=3):
    x = torch.randn(size, config.in_channels, config.sample_size, config.sample_size)
    return x, torch.arange(size) * 100, torch.arange(size)


@pytest.mark.parametrize("changes", [TINY, ROUTED])
def test_a_fresh_model_predicts_zero(changes):
    model = MoHDiT(MoHDiTConfig(**changes))
    output = model(*batch(model.config))
    assert output.shape == (3, 8, 8, 8)
    assert output.count_nonzero() == 0


def test_every_layer_that_routes_returns_its_routing():
    model = make(**ROUTED)
    _, routings = model(*batch(model.config), return_routing=True)
    assert [routing.selected_BNH.sum(-1).unique().tolist() for routing in routings] == [[2], [2], [3]]
    assert mean_balance_loss(routings) == torch.stack([r.balance_loss for r in routings[1:]]).mean()
    _, none = make(**TINY)(*batch(model.config), return_routing=True)
    assert none == ()
    assert mean_balance_loss(none) is None


def test_zero_routers_of_all_heads_are_dense_attention():
    dense = make(**TINY)
    routed = MoHDiT(MoHDiTConfig(**{**TINY, "shared_heads": 1, "top_k": (1, 2, 3)})).eval()
    missing, unexpected = routed.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected
    assert all("router" in name for name in missing)
    for _, attention in routed.named_attention():
        attention.router.reset_parameters()
    inputs = batch(dense.config)
    torch.testing.assert_close(routed(*inputs), dense(*inputs), rtol=0, atol=1e-6)


def test_weights_under_the_names_of_the_first_version_still_load():
    model = make(**{**TINY, "shared_heads": 1, "top_k": 1})
    former = {name.replace(".router.", ".moh_router."): value for name, value in model.state_dict().items()}
    assert former.keys() != model.state_dict().keys()
    again = MoHDiT(model.config).eval()
    again.load_state_dict(former)
    inputs = batch(model.config)
    torch.testing.assert_close(again(*inputs), model(*inputs), rtol=0, atol=0)


def test_gradient_checkpointing_changes_nothing():
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = make(**ROUTED).train()
        model.gradient_checkpointing = checkpointing
        output, routings = model(*batch(model.config), return_routing=True)
        (output.square().mean() + 0.01 * mean_balance_loss(routings)).backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_gradients_of_a_routed_block():
    model = make(**ROUTED).double()
    x, t, y = batch(model.config, 1)

    def loss(x, scale):
        output, routings = model(x, t, y, return_routing=True, impl="gathered")
        return output.mul(scale).sum() + mean_balance_loss(routings)

    inputs = (x.double().requires_grad_(), torch.rand(8, 8, dtype=torch.float64).requires_grad_())
    assert gradcheck(loss, inputs, eps=1e-6, atol=1e-6)


def test_engines_agree_on_outputs_and_gradients():
    results = {}
    for impl in ("reference", "auto", "cpu"):
        torch.manual_seed(0)
        model = make(**ROUTED)
        output = model(*batch(model.config), impl=impl)
        output.square().sum().backward()
        results[impl] = [output, *(p.grad for p in model.parameters() if p.requires_grad)]
    for impl in ("auto", "cpu"):
        for one, other in zip(results["reference"], results[impl], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_autocast_and_bfloat16():
    model = make(**ROUTED)
    x, t, y = batch(model.config)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        mixed = model(x, t, y)
    exact = model(x, t, y)
    torch.testing.assert_close(mixed.float(), exact, rtol=0.1, atol=0.3)
    half = model.bfloat16()(x.bfloat16(), t, y)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.3)


def test_guidance_acts_on_the_first_three_channels():
    model = make(**ROUTED)
    x, t, y = batch(model.config, 2)
    null = torch.full_like(y, model.config.num_classes)
    classes = torch.cat([y, null])
    plain = model(torch.cat([x, x]), t[:1], classes)
    guided = model.forward_with_cfg(torch.cat([x, torch.zeros_like(x)]), t[:1], classes, 3.0)
    expected = plain[2:, :3] + 3.0 * (plain[:2, :3] - plain[2:, :3])
    torch.testing.assert_close(guided[:, :3], torch.cat([expected, expected]))
    torch.testing.assert_close(guided[:, 3:], plain[:, 3:])
    unguided = model.forward_with_cfg(torch.cat([x, x]), t[:1], classes, 1.0)
    torch.testing.assert_close(unguided[:2], plain[:2])
    with pytest.raises(MixheadError, match="two equal halves"):
        model.forward_with_cfg(x[:1], t[:1], y[:1], 1.5)


def test_what_every_token_used_can_be_recorded():
    model = make(**ROUTED)
    with mixhead.keep_routing(model) as log:
        model(*batch(model.config))
    assert [name for name, _ in log.layers] == [f"blocks.{i}.attention" for i in range(3)]
    assert [float(load.sum()) for load in log.load().values()] == pytest.approx([2, 2, 3])


def test_inputs_that_do_not_fit():
    model = make(**ROUTED)
    x, t, y = batch(model.config)
    with pytest.raises(MixheadError, match="class 6 is out of range: the model knows 0 to 4 and 5 for no class"):
        model(x, t, y + 4)
    with pytest.raises(MixheadError, match="class -1 is out of range"):
        model(x, t, y - 1)
    with pytest.raises(MixheadError, match=r"x must be \[batch, 4, 8, 8\], got \[3, 4, 9, 9\]"):
        model(torch.randn(3, 4, 9, 9), t, y)
    with pytest.raises(MixheadError, match=r"one entry for each of the 3 samples, got \[2\] and \[3\]"):
        model(x, t[:2], y)
    without_null = make(**{**ROUTED, "null_class": False})
    with pytest.raises(MixheadError, match=r"class 5 is out of range: the model knows 0 to 4\."):
        without_null(x, t, y + 3)
