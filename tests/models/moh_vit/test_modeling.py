"""MoH-ViT as a model of transformers: sizes, losses, routing, stochastic depth, saving."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageClassification

import mixhead
from mixhead.errors import MixheadError
from mixhead.models.moh_vit import MoHTransNeXtConfig, MoHTransNeXtForImageClassification
from mixhead.models.moh_vit.positions import relative_positions
from mixhead.ops import RelativeBias

CPU = torch.device("cpu")

TINY = {
    "image_size": 64,
    "hidden_sizes": (12, 24, 48, 48),
    "num_heads": (2, 4, 4, 4),
    "depths": (1, 1, 2, 1),
    "mlp_ratios": (4, 4, 2, 2),
    "num_labels": 5,
}
ROUTED = {"shared_heads": (2, 1, 2, 0), "top_k": (0, 2, 1, 2)}  # all shared, one shared, both kinds, none shared


def tiny(**changes) -> MoHTransNeXtForImageClassification:
    torch.manual_seed(0)
    return MoHTransNeXtForImageClassification(MoHTransNeXtConfig(**{**TINY, **ROUTED, **changes}))


@pytest.fixture(scope="module")
def model() -> MoHTransNeXtForImageClassification:
    return tiny().eval()


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 160), (96, 64)])
def test_any_size_of_image(model, size):
    with torch.no_grad():
        output = model(torch.randn(2, 3, *size), output_hidden_states=True)
    assert output.logits.shape == (2, 5)
    assert output.logits.isfinite().all()
    rows, columns = (-(-side // 4) for side in size)
    for maps in output.hidden_states:
        assert maps.shape[2:] == (rows, columns)
        rows, columns = -(-rows // 2), -(-columns // 2)


def test_the_largest_size_on_one_stage_of_attention():
    """512 pixels, on a model narrow enough for a test."""
    small = tiny(hidden_sizes=(4, 4, 4, 4), num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1), shared_heads=None, top_k=None)
    with torch.no_grad():
        assert small.eval()(torch.randn(1, 3, 512, 480)).logits.isfinite().all()


def test_what_is_no_image_is_refused(model):
    with pytest.raises(MixheadError, match=r"pixel_values must be \[batch, 3, height, width\], got \[1, 1, 64, 64\]"):
        model(torch.randn(1, 1, 64, 64))
    with pytest.raises(MixheadError, match=r"An image of 64 x 31 pixels is too small: either side .* at least 32"):
        model(torch.randn(1, 3, 64, 31))


def vertical_distances(positions) -> torch.Tensor:
    """The vertical distance of every pair, as if it were a bias."""
    table_1RS = positions.distances_RS2[..., 0].unsqueeze(0)
    return RelativeBias(table_1RS, positions.row_YU, positions.column_XV).pairs_HNT()


def test_positions_of_another_size_keep_the_trained_scale():
    """At twice the trained size the pairs that lie inside one quarter have the distances that they had."""
    trained = relative_positions((8, 8), (2, 2), (8, 8), CPU)
    larger = relative_positions((16, 8), (4, 2), (8, 8), CPU)
    before = vertical_distances(trained).view(8, 8, 2, 2)
    after = vertical_distances(larger).view(16, 8, 4, 2)
    torch.testing.assert_close(after[:8, :, :2], before)
    # Vertical distance of the first query and the last pooled key, 0 - (1.5 + 8) or 4 tokens, on the logarithmic scale.
    expected = -torch.log2(torch.tensor(5.5 / 7 * 8 + 1)) / 3
    torch.testing.assert_close(before[0, 0, 1, 0], expected)


def test_positions_where_the_trained_map_is_one_token():
    assert relative_positions((2, 3), (2, 3), (1, 1), CPU).distances_RS2.isfinite().all()


def test_routing_is_returned_as_asked_for(model):
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        output = model(x, output_routing=True)
        with mixhead.record_routing(model) as log:
            assert model(x).logits.equal(output.logits)
    assert [tuple(r.selected_BNH.shape) for r in output.routing] == [
        (2, 256, 2), (2, 64, 4), (2, 16, 4), (2, 16, 4), (2, 4, 4),
    ]  # fmt: skip
    assert [r.selected_BNH.sum(-1).unique().tolist() for r in output.routing] == [[2], [3], [3], [3], [2]]
    assert log.layers[0][0] == "stages.0.blocks.0.attention"
    for recorded, returned in zip(log.layers, output.routing, strict=True):
        assert recorded[1].selected_BNH.equal(returned.selected_BNH)
    assert model(x).routing is None


def test_balance_loss_counts_in_training_mode_only():
    model, x, labels = tiny(), torch.randn(2, 3, 64, 64), torch.tensor([1, 4])
    trained = model(x, labels=labels, output_routing=True)
    competing = [r.balance_loss for r in trained.routing if r.probs_BNH is not None]
    assert len(competing) == 4  # all layers but the one whose heads are all shared
    torch.testing.assert_close(trained.balance_loss, torch.stack(competing).mean())
    expected = F.cross_entropy(trained.logits, labels) + 0.01 * trained.balance_loss
    torch.testing.assert_close(trained.loss, expected)
    evaluated = model.eval()(x, labels=labels)
    torch.testing.assert_close(evaluated.loss, F.cross_entropy(evaluated.logits, labels))
    assert evaluated.balance_loss is None


def test_probabilities_as_labels():
    model, x = tiny().eval(), torch.randn(2, 3, 64, 64)
    hard = torch.tensor([1, 4])
    soft = F.one_hot(hard, 5).float()
    torch.testing.assert_close(model(x, labels=soft).loss, model(x, labels=hard).loss)


def test_every_parameter_is_trained():
    model = tiny()
    model(torch.randn(2, 3, 64, 64), labels=torch.tensor([0, 1])).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_dense_transnext_is_moh_without_gates():
    """A dense model has no router; equal gates of 1 (zero router weights) give the same result."""
    dense = tiny(shared_heads=None, top_k=None).eval()
    routed = tiny(shared_heads=(1, 1, 2, 0), top_k=(1, 3, 2, 4)).eval()
    result = routed.load_state_dict(dense.state_dict(), strict=False)
    assert all("moh_router" in name for name in result.missing_keys)
    for name, parameter in routed.named_parameters():
        if "moh_router" in name:
            torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(routed(x).logits, dense(x).logits, rtol=0, atol=1e-6)
        assert dense(x, output_routing=True).routing == ()
        assert dense(x, output_routing=True).balance_loss is None


def test_gradient_checkpointing_changes_nothing():
    x, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 4])
    gradients = []
    for checkpointed in (False, True):
        model = tiny()
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(x, labels=labels).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_stochastic_depth_drops_whole_branches_and_keeps_the_mean():
    model = tiny(drop_path_rate=0.5)
    rates = [block.drop_path_rate for stage in model.vit.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5])
    block = model.vit.stages[3].blocks[0]
    branch = torch.ones(4000, 3, 2)
    dropped = block.drop_path(branch)
    assert dropped.unique().tolist() == [0.0, 2.0]
    assert (dropped == dropped[:, :1, :1]).all()  # a sample's branch as a whole
    assert dropped.mean() == pytest.approx(1.0, abs=0.1)
    assert block.eval().drop_path(branch) is branch


def test_what_the_recipe_trains_without_weight_decay():
    model = tiny()
    kept = model.no_weight_decay()
    attention = "vit.stages.0.blocks.0.attention."
    for name in ("temperature", "query_embedding", "local_bias", "position_bias.fc1.weight", "o_proj.bias"):
        assert attention + name in kept
    for name in ("q_proj.weight", "learnable_tokens", "moh_router.shared_proj.weight"):
        assert attention + name in dict(model.named_parameters())
        assert attention + name not in kept


def test_saved_and_loaded_by_the_auto_class(model, tmp_path):
    mixhead.save(model, None, tmp_path / "m")
    x = torch.randn(1, 3, 48, 64)
    for loaded in (AutoModelForImageClassification.from_pretrained(tmp_path / "m"), mixhead.load(tmp_path / "m")):
        assert isinstance(loaded, MoHTransNeXtForImageClassification)
        weights = model.state_dict()
        assert all(weight.equal(weights[name]) for name, weight in loaded.state_dict().items())
        # Products may round differently where the file puts the weights at other addresses.
        torch.testing.assert_close(loaded.eval()(x).logits, model(x).logits, rtol=0, atol=1e-6)


def test_positions_are_not_in_the_state_dict(model):
    other = copy.deepcopy(model)
    before = other.state_dict().keys()
    other(torch.randn(1, 3, 96, 32))
    assert other.state_dict().keys() == before
    assert not list(other.named_buffers())


def test_kept_position_biases_follow_the_weights():
    """Without gradients the biases are kept; a change of the weights that leaves no trace is noticed all the same."""
    model, x = tiny().eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x).logits
        assert model(x).logits.equal(before)
        other = model(x[..., :32]).logits
        weight = model.vit.stages[0].blocks[0].attention.position_bias.fc2.weight
        weight.data.mul_(-300.0)
        changed = model(x).logits
    assert not changed.equal(before)
    torch.testing.assert_close(changed, model(x).logits)  # with gradients nothing is kept
    with torch.inference_mode():
        assert not model(x[..., :32]).logits.equal(other)


def test_bfloat16_and_autocast_stay_close(model):
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x).logits
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x).logits.float(), expected, rtol=0.1, atol=0.02)
        half = copy.deepcopy(model).bfloat16()
        torch.testing.assert_close(half(x.bfloat16()).logits.float(), expected, rtol=0.1, atol=0.02)
