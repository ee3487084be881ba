"""Sizes of MoH-DiT: the published ones, and combinations that cannot be."""

import pytest
import torch

from mixhead.errors import MixheadError
from mixhead.models.moh_dit import PUBLISHED, MoHDiT, MoHDiTConfig

# Parameters with the fixed position embedding, and the share of active heads, of the published models.
PARAMETERS = {
    "moh-dit-s-90": (32_997_152, 0.889),
    "moh-dit-s-75": (32_998_688, 0.75),
    "moh-dit-b-90": (130_638_368, 0.896),
    "moh-dit-b-75": (130_638_368, 0.75),
    "moh-dit-l-90": (458_512_416, 0.896),
    "moh-dit-l-75": (458_528_800, 0.75),
    "moh-dit-xl-90": (675_666_464, 0.8996),
    "moh-dit-xl-75": (675_689_504, 0.75),
    "dit-s": (32_963_360, 1.0),
    "dit-b": (130_512_416, 1.0),
    "dit-l": (458_102_816, 1.0),
    "dit-xl": (675_129_632, 1.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_active_heads(name):
    config = MoHDiTConfig.named(name)
    with torch.device("meta"):
        model = MoHDiT(config)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == PARAMETERS[name][0]
    assert config.active_share == pytest.approx(PARAMETERS[name][1], abs=5e-4)
    assert config.routes == (name.startswith("moh"),) * config.depth
    assert [heads.num_heads for heads in config.layers] == [m.num_heads for _, m in model.named_attention()]


def test_heads_grow_with_depth_in_the_large_ones():
    config = MoHDiTConfig.named("moh-dit-xl-90")
    assert config.num_heads == (8,) * 9 + (16,) * 10 + (24,) * 9
    assert config.head_dim == (72,) * 28
    assert sum(config.num_heads) == sum(MoHDiTConfig.named("dit-xl").num_heads) == 448


def test_other_patches_and_inputs():
    config = MoHDiTConfig.named("dit-s", patch_size=4, sample_size=28, in_channels=1, num_classes=10)
    assert config.num_tokens == 49
    assert config.out_channels == 2
    assert MoHDiTConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sample_size": 33}, "33 x 33 cannot be cut into patches of 2 x 2"),
        ({"patch_size": 0}, "patch_size=0 must be a whole number of at least 1"),
        ({"num_heads": (6, 6)}, "num_heads has 2 numbers, but the model has 12 layers"),
        ({"num_heads": 7}, "hidden_size=384 is no multiple of num_heads=7: give head_dim"),
        ({"shared_heads": 2}, "both shared_heads and top_k, or neither"),
        ({"shared_heads": 4, "top_k": 3}, "Layer 0 has 6 heads, too few for shared_heads=4 and top_k=3"),
        ({"shared_heads": 4, "top_k": 0}, "top_k=0 leaves 2 of 6 heads unused for ever"),
        ({"shared_heads": -1, "top_k": 3}, "must be whole numbers of at least 0"),
        ({"router": "oracle"}, "router='oracle' is unknown"),
        ({"hidden_size": 390}, "must be a multiple of 4"),
        ({"frequency_shift": 2}, "must be 0"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio=nan must be a positive number"),
    ],
)
def test_what_cannot_be_is_refused(changes, sentence):
    with pytest.raises(MixheadError, match=sentence):
        MoHDiTConfig.named("dit-s", **changes)


def test_unknown_names():
    with pytest.raises(MixheadError, match="choose one of moh-dit-s-90"):
        MoHDiTConfig.named("moh-dit-xxl-90")
    with pytest.raises(MixheadError, match="unknown fields: heads"):
        MoHDiTConfig.from_dict({"heads": 3})
