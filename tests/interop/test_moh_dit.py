"""MoH-DiT and dense DiT of the official code: the golden case, and what does not fit."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mixhead
from mixhead.errors import MixheadError
from mixhead.interop import export_moh_dit, from_official, load_moh_dit
from mixhead.interop.dit import is_dit_file, official_names
from mixhead.models.moh_dit import PUBLISHED, MoHDiT, MoHDiTConfig

OUTPUT = {"rtol": 0, "atol": 1e-5}
DENSE = {
    "sample_size": 4, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 3, "num_classes": 4,
    "learn_sigma": False,
}  # fmt: skip


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


def test_numbers_for_all_layers_or_for_each(golden):
    case = golden("moh_dit_model")
    config = {**case.config, "head_dim": 12}
    model = from_official("moh_dit", config, case.state_dict)
    assert model.config == from_official("moh_dit", case.config, case.state_dict).config


@pytest.mark.parametrize("official", [{"moh": False}, {"moh": False, "shared_head": [2, 2], "routed_head": [1, 1]}, {}])
def test_a_dense_dit_is_multi_head_attention(official):
    """The block of the published dense DiT, written out."""
    config = {"input_size": 4, "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 3}
    config |= {"num_classes": 4, "learn_sigma": False, **official}
    ours = MoHDiT(MoHDiTConfig(**DENSE))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3)
    weights = official_names(ours.state_dict())
    model = from_official("moh_dit", config, weights)
    assert not any(model.config.routes)
    x, c = torch.randn(2, 4, 24), torch.randn(2, 24)
    w = {name.removeprefix("blocks.1."): tensor for name, tensor in weights.items() if name.startswith("blocks.1.")}
    modulation = F.linear(F.silu(c), w["adaLN_modulation.1.weight"], w["adaLN_modulation.1.bias"]).unsqueeze(1)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, -1)
    normed = F.layer_norm(x, (24,), eps=1e-6) * (1 + scale) + shift
    qkv = F.linear(normed, w["attn.qkv.weight"], w["attn.qkv.bias"]).view(2, 4, 3, 3, 8).permute(2, 0, 3, 1, 4)
    heads = (qkv[0] @ qkv[1].mT / 8**0.5).softmax(-1) @ qkv[2]
    attended = F.linear(heads.transpose(1, 2).flatten(2), w["attn.proj.weight"], w["attn.proj.bias"])
    expected = x + gate * attended
    normed = F.layer_norm(expected, (24,), eps=1e-6) * (1 + mlp_scale) + mlp_shift
    hidden = F.gelu(F.linear(normed, w["mlp.fc1.weight"], w["mlp.fc1.bias"]), approximate="tanh")
    expected = expected + mlp_gate * F.linear(hidden, w["mlp.fc2.weight"], w["mlp.fc2.bias"])
    torch.testing.assert_close(model.blocks[1](x, F.silu(c))[0], expected, rtol=1e-5, atol=1e-5)


def test_weights_that_do_not_fit_are_named(golden):
    case = golden("moh_dit_model")
    weights = case.state_dict
    without = {k: v for k, v in weights.items() if k != "blocks.1.attn.wg_0.weight"}
    with pytest.raises(MixheadError, match=r"missing \['blocks.1.attention.router.stage_proj.weight'\]"):
        from_official("moh_dit", case.config, without)
    with pytest.raises(MixheadError, match=r"unexpected \['blocks.0.attention.wg_2.weight'\]"):
        from_official("moh_dit", case.config, {**weights, "blocks.0.attn.wg_2.weight": torch.ones(1)})
    with pytest.raises(MixheadError, match=r"class_embed.weight must be \[10, 48\], but it is \[8, 48\]"):
        from_official("moh_dit", {**case.config, "num_classes": 9}, weights)
    with pytest.raises(MixheadError, match="lacks 'depth'"):
        from_official("moh_dit", {k: v for k, v in case.config.items() if k != "depth"}, weights)


def test_the_model_owns_its_weights(golden):
    case = golden("moh_dit_model")
    weights = case.state_dict
    model = from_official("moh_dit", case.config, weights)
    inputs = case["x"], case["t"], case["y"]
    before = model(*inputs)
    for tensor in weights.values():
        tensor.zero_()
    assert model(*inputs).equal(before)
    assert not model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_official_names_are_a_way_back(golden):
    case = golden("moh_dit_model")
    names = official_names(from_official("moh_dit", case.config, case.state_dict).state_dict())
    assert names.keys() == case.state_dict.keys()
    assert all(names[name].equal(tensor) for name, tensor in case.state_dict.items())


# ----------------------------------------------------------------------------------------- checkpoints of the training


@pytest.fixture
def small_is_tiny(golden, monkeypatch):
    """The published checkpoints are too large for a test: a configuration of the golden case's size takes a name."""
    config = from_official("moh_dit", golden("moh_dit_model").config, golden("moh_dit_model").state_dict).config
    sizes = ("hidden_size", "depth", "num_heads", "head_dim", "shared_heads", "top_k")
    monkeypatch.setitem(PUBLISHED, "moh-dit-s-75", {name: getattr(config, name) for name in sizes})


def checkpoint(weights, **entries):
    """What the official training script saves."""
    return {
        "model": {name: torch.zeros_like(tensor) for name, tensor in weights.items()},
        "ema": weights,
        "opt": {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.ones(9)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="DiT-XL/2", image_size=256, epochs=1400, vae="ema"),
        **entries,
    }


def test_a_training_checkpoint_gives_its_averaged_weights(golden, small_is_tiny, tmp_path):
    case = golden("moh_dit_model")
    torch.save(checkpoint(case.state_dict), tmp_path / "7000000.pt")
    model = load_moh_dit(tmp_path / "7000000.pt")
    assert (model.config.sample_size, model.config.num_classes) == (8, 7)
    torch.testing.assert_close(model(case["x"], case["t"], case["y"]), case["out"], **OUTPUT)
    torch.save({f"module.{name}": tensor for name, tensor in case.state_dict.items()}, tmp_path / "bare.pt")
    for config in (None, "moh-dit-s-75", model.config):
        again = load_moh_dit(tmp_path / "bare.pt", config)
        torch.testing.assert_close(again(case["x"], case["t"], case["y"]), case["out"], **OUTPUT)


def test_a_checkpoint_that_is_none_of_the_published(golden, small_is_tiny, tmp_path):
    weights = golden("moh_dit_model").state_dict
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(MixheadError, match="48 wide and 4 deep, fit none of these configurations: dit-s"):
        load_moh_dit(tmp_path / "w.pt", "dit-s")
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(MixheadError, match=r"none of a DiT: there is no usable 'x_embedder\.proj"):
        load_moh_dit(tmp_path / "w.pt")
    assert not is_dit_file(tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes(b"PK")
    with pytest.raises(MixheadError, match="truncated or corrupt"):
        load_moh_dit(tmp_path / "w.pt")


class Hostile:
    """Whoever unpickles it runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["ema", "args", "opt"])
def test_hostile_checkpoints_execute_nothing(golden, tmp_path, where):
    mark = tmp_path / "executed"
    torch.save(checkpoint(golden("moh_dit_model").state_dict, **{where: Hostile(f"touch {mark}")}), tmp_path / "w.pt")
    with pytest.raises(MixheadError, match="refused, and nothing in it was executed"):
        load_moh_dit(tmp_path / "w.pt")
    assert not mark.exists()


MEASURE = """
import re, sys, torch
from pathlib import Path
from mixhead.interop import load_moh_dit
from mixhead.models.moh_dit import MoHDiTConfig
def peak():  # of this process; what getrusage knows begins with the peak of the parent
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
def run(model):
    with torch.no_grad():
        model(torch.randn(1, 4, 4, 4), torch.tensor([3]), torch.tensor([1]))
config = MoHDiTConfig(**eval(sys.argv[2]))
run(load_moh_dit(sys.argv[3], MoHDiTConfig(**eval(sys.argv[4]))))  # whatever a first run needs
before = peak()
model = load_moh_dit(sys.argv[1], config)
run(model)
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((peak() - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory where Linux shows it")
def test_memory_of_a_training_checkpoint(tmp_path):
    """Weights, averages and two moments are in the file; what is loaded and used is one of the four."""
    sizes = {"sample_size": 4, "hidden_size": 384, "depth": 4, "num_heads": 6, "num_classes": 10}
    tiny = {**sizes, "hidden_size": 24, "depth": 1}
    with torch.device("meta"):
        shapes = official_names(MoHDiT(MoHDiTConfig(**sizes)).state_dict())
    weights = {name: torch.ones(tensor.shape) for name, tensor in shapes.items()}
    moments = {i: {"exp_avg": w.clone(), "exp_avg_sq": w.clone()} for i, w in enumerate(weights.values())}
    torch.save(checkpoint(weights, opt={"state": moments}), tmp_path / "large.pt")
    torch.save(official_names(MoHDiT(MoHDiTConfig(**tiny)).state_dict()), tmp_path / "tiny.pt")
    arguments = [str(tmp_path / "large.pt"), repr(sizes), str(tmp_path / "tiny.pt"), repr(tiny)]
    command = [sys.executable, "-c", MEASURE, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert 0.9 < float(run.stdout) < 1.3


def test_export_and_back(golden, tmp_path):
    case = golden("moh_dit_model")
    model = from_official("moh_dit", case.config, case.state_dict)
    export_moh_dit(model, tmp_path / "out.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["out.pt"]
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    assert content.keys() == {"ema", "model"}
    assert all(content["ema"][name].equal(tensor) for name, tensor in case.state_dict.items())
    again = load_moh_dit(tmp_path / "out.pt", model.config)
    torch.testing.assert_close(again(case["x"], case["t"], case["y"]), case["out"], **OUTPUT)
    with pytest.raises(MixheadError, match="could not be written"):
        export_moh_dit(model, tmp_path / "absent" / "out.pt")
    dense = mixhead.convert(MoHDiT(MoHDiTConfig(**DENSE)), mixhead.MoHConfig(active_heads=2))
    with pytest.raises(MixheadError, match="official code has no 'linear' router"):
        export_moh_dit(dense, tmp_path / "linear.pt")
