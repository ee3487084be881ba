"""MoH-ViT of the official code: the golden case, and training checkpoints in the published form."""

import argparse
import os

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from mixhead.cli.app import run
from mixhead.errors import MixheadError
from mixhead.interop import from_official, load_moh_vit
from mixhead.interop.vit import OFFICIAL_NAMES
from mixhead.models.moh_vit import PUBLISHED

OUTPUT = {"rtol": 0, "atol": 1e-5}
NAME = "moh-vit-s-75"


class Hostile:
    """Whoever unpickles it runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_golden_case(golden):
    case = golden("moh_vit_model")
    model = from_official("moh_vit", case.config, case.state_dict)
    with torch.no_grad():
        output = model(case["x"], output_routing=True, output_hidden_states=True)
        torch.testing.assert_close(output.logits, case["logits"], **OUTPUT)
        features = output.hidden_states[-1].flatten(2).mean(-1)
        torch.testing.assert_close(features, case["features"], **OUTPUT)
    losses = [routing.balance_loss for routing in output.routing if routing.probs_BNH is not None]
    torch.testing.assert_close(torch.stack(losses), case["aux_per_layer"], **OUTPUT)
    torch.testing.assert_close(output.balance_loss, case["aux_per_layer"].mean(), **OUTPUT)


def test_norms_have_their_own_eps(golden):
    """Those of embeddings and pooled keys have PyTorch's; in double precision the golden features tell them apart."""
    case = golden("moh_vit_model")
    model = from_official("moh_vit", case.config, case.state_dict)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == (1e-5 if "embed" in name or "pool_norm" in name else 1e-6), name


def test_weights_that_do_not_fit_are_named(golden):
    case = golden("moh_vit_model")
    weights = case.state_dict
    without = {k: v for k, v in weights.items() if k != "block3.0.attn.wg_0.weight"}
    with pytest.raises(MixheadError, match=r"missing vit.stages.2.blocks.0.attention.moh_router.stage_proj.weight"):
        from_official("moh_vit", case.config, without)
    with pytest.raises(MixheadError, match=r"missing none, unexpected block3.0.attn.wg_2.weight"):
        from_official("moh_vit", case.config, {**weights, "block3.0.attn.wg_2.weight": torch.ones(1)})
    with pytest.raises(MixheadError, match=r"head.weight must be \[5, 48\], .* but it is \[7, 48\]"):
        from_official("moh_vit", case.config, {**weights, "head.weight": torch.ones(7, 48)})
    with pytest.raises(MixheadError, match=r"head.bias must be of a floating type"):
        from_official("moh_vit", case.config, {**weights, "head.bias": torch.ones(5, dtype=torch.long)})
    with pytest.raises(MixheadError, match="lacks 'depths'"):
        from_official("moh_vit", {k: v for k, v in case.config.items() if k != "depths"}, weights)


def test_the_model_owns_its_weights(golden):
    case = golden("moh_vit_model")
    weights = case.state_dict
    model = from_official("moh_vit", case.config, weights)
    before = model(case["x"]).logits
    for tensor in weights.values():
        tensor.zero_()
    assert model(case["x"]).logits.equal(before)
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training


def test_weights_keep_their_dtype(golden):
    case = golden("moh_vit_model")
    for dtype in (torch.float64, torch.bfloat16):
        weights = {name: tensor.to(dtype) for name, tensor in case.state_dict.items()}
        assert {p.dtype for p in from_official("moh_vit", case.config, weights).parameters()} == {dtype}
    weights["head.bias"] = weights["head.bias"].float()
    assert {p.dtype for p in from_official("moh_vit", case.config, weights).parameters()} == {torch.float32}


# ----------------------------------------------------------------------------------- published training checkpoints


@pytest.fixture
def small_is_tiny(golden, monkeypatch):
    """The published checkpoints are too large for a test: a configuration of the golden case's size takes the name."""
    tiny = from_official("moh_vit", golden("moh_vit_model").config, golden("moh_vit_model").state_dict).config
    sizes = ("hidden_sizes", "num_heads", "depths", "mlp_ratios", "shared_heads", "top_k")
    monkeypatch.setitem(PUBLISHED, NAME, {name: getattr(tiny, name) for name in sizes})


def checkpoint(case, **entries):
    """What the official training script saves."""
    return {
        "model": case.state_dict,
        "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "lr_scheduler": {"base_values": [1e-3], "t_initial": 300},
        "epoch": 299,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="moh_transnext_small_75", input_size=64, drop_path=0.45, resume=None),
        "max_accuracy": 84.6,
        **entries,
    }


def test_all_official_names_are_known():
    assert set(OFFICIAL_NAMES.values()) == set(PUBLISHED)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_a_training_checkpoint(golden, small_is_tiny, tmp_path, prefix):
    case = golden("moh_vit_model")
    file = tmp_path / "anything.pth"
    torch.save(checkpoint(case, model={prefix + k: v for k, v in case.state_dict.items()}), file)
    model = load_moh_vit(file)
    assert model.config.num_labels == 5
    assert model.config.image_size == 64
    with torch.no_grad():
        torch.testing.assert_close(model(case["x"]).logits, case["logits"], **OUTPUT)


def test_weights_alone_are_known_by_the_file_or_by_what_is_said(golden, small_is_tiny, tmp_path):
    weights = golden("moh_vit_model").state_dict
    torch.save(weights, tmp_path / "moh_transnext_small_75.pth")
    assert load_moh_vit(tmp_path / "moh_transnext_small_75.pth").config.top_k == (0, 0, 1, 2)
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(MixheadError, match="does not say which published configuration it is: give its name"):
        load_moh_vit(tmp_path / "w.pth")
    assert load_moh_vit(tmp_path / "w.pth", NAME).config.top_k == (0, 0, 1, 2)
    with pytest.raises(MixheadError, match="do not fit the configuration"):
        load_moh_vit(tmp_path / "w.pth", "transnext-tiny")
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(MixheadError, match="no classifier"):
        load_moh_vit(tmp_path / "w.pth", NAME)


@pytest.mark.parametrize("where", ["model", "args", "optimizer", "entry"])
def test_hostile_checkpoints_execute_nothing(golden, tmp_path, where):
    mark = tmp_path / "executed"
    bomb, case = Hostile(f"touch {mark}"), golden("moh_vit_model")
    content = {
        "model": checkpoint(case, model={**case.state_dict, "head.weight": bomb}),
        "args": checkpoint(case, args=argparse.Namespace(model=bomb)),
        "optimizer": checkpoint(case, optimizer=bomb),
        "entry": checkpoint(case, note=bomb),
    }[where]
    torch.save(content, tmp_path / "moh_transnext_small_75.pth")
    with pytest.raises(MixheadError, match=r"refused, and nothing in it was executed: it asks for .*system"):
        load_moh_vit(tmp_path / "moh_transnext_small_75.pth")
    assert not mark.exists()


def test_convert_writes_a_folder_that_the_auto_classes_load(golden, small_is_tiny, tmp_path, capsys):
    case = golden("moh_vit_model")
    file, out = tmp_path / "moh_transnext_small_75.pth", tmp_path / "out"
    torch.save(checkpoint(case), file)
    assert run(["convert", str(file), str(out)]) == 0
    assert "an image classifier, 83.3% of its heads" in " ".join(capsys.readouterr().out.split())
    assert sorted(f.name for f in out.iterdir()) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    model = AutoModelForImageClassification.from_pretrained(out).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(case["x"]).logits, case["logits"], **OUTPUT)
    processor = AutoImageProcessor.from_pretrained(out)
    image = torch.randint(0, 255, (3, 90, 120), dtype=torch.uint8).numpy()
    assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)
    assert processor.size["shortest_edge"] == 73  # 64 pixels are 87.5% of it
    assert run(["convert", str(file), str(out)]) == 2  # never overwritten unasked
    assert run(["convert", str(tmp_path / "absent.pth"), str(tmp_path / "o")]) == 2
