"""The published sizes, and configurations that cannot be."""

import copy

import pytest
import torch
from transformers import AutoConfig

from mixhead.errors import MixheadError
from mixhead.models.moh_vit import PUBLISHED, MoHTransNeXtConfig, MoHTransNeXtForImageClassification

# name: (parameters, those of the routers, heads that a token uses, all heads)
COUNTS = {
    "moh-vit-b-75": (90_020_632, 299_136, 441, 588),
    "moh-vit-b-50": (90_023_512, 302_016, 294, 588),
    "moh-vit-s-80": (49_910_548, 168_984, 343, 429),
    "moh-vit-s-75": (49_910_548, 168_984, 323, 429),
    "transnext-tiny": (28_258_960, 0, 246, 246),
    "transnext-small": (49_741_564, 0, 429, 429),
    "transnext-base": (89_721_496, 0, 588, 588),
}


def test_every_published_configuration_is_counted():
    assert COUNTS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_active_heads(name):
    parameters, routers, used, heads = COUNTS[name]
    config = MoHTransNeXtConfig.named(name)
    with torch.device("meta"):
        model = MoHTransNeXtForImageClassification(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for n, p in model.named_parameters() if "moh_router" in n) == routers
    assert config.active_share == used / heads
    assert sum(d * h for d, h in zip(config.depths, config.num_heads, strict=True)) == heads
    assert config.routes == name.startswith("moh")


def test_named_takes_changes_and_refuses_unknown_names():
    assert MoHTransNeXtConfig.named("transnext-tiny", num_labels=10).num_labels == 10
    assert MoHTransNeXtConfig.named("transnext-tiny").num_labels == 1000
    with pytest.raises(MixheadError, match="'vit-b' is unknown: choose one of moh-vit-b-75"):
        MoHTransNeXtConfig.named("vit-b")


def test_a_saved_configuration_comes_back(tmp_path):
    config = MoHTransNeXtConfig.named("moh-vit-s-75", num_labels=7)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MoHTransNeXtConfig)
    told = ("transformers_version", "_name_or_path")
    kept, expected = ({k: v for k, v in c.to_dict().items() if k not in told} for c in (loaded, config))
    assert kept == expected
    assert loaded.shared_heads == (3, 6, 3, 4)  # a tuple again, not JSON's list


def test_the_architecture_is_fixed_once_made():
    config = copy.deepcopy(MoHTransNeXtConfig.named("moh-vit-s-75"))
    with pytest.raises(MixheadError, match="top_k of a configuration that is made cannot be changed"):
        config.top_k = (0, 0, 3, 12)
    config.top_k = [0, 0, 6, 12]  # the same
    config.num_labels = 3
    assert config.num_labels == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_sizes": (96, 192)}, "num_heads has 4 numbers, but hidden_sizes has 2 stages"),
        ({"hidden_sizes": ()}, "hidden_sizes is empty"),
        ({"depths": (5, 0, 23, 5)}, "depths=.* must be a list of positive whole numbers"),
        ({"mlp_ratios": (8, 8, 4, 0.0)}, "mlp_ratios=.* must be a list of positive numbers"),
        ({"num_heads": (5, 8, 16, 32)}, "Stage 1: num_heads=5 must divide hidden_sizes=96"),
        ({"pool_ratios": (8, 4, 2, 2)}, "must end in 1"),
        ({"window_size": 4}, "must be odd"),
        ({"image_size": 31}, "image_size=31 is too small for 4 stages: it must be at least 32"),
        ({"image_size": True}, "image_size=True must be a whole number"),
        ({"drop_path_rate": 1.0}, "must be at least 0 and below 1"),
        ({"balance_coefficient": -0.1}, "must not be negative"),
        ({"shared_heads": (4, 8, 4, 5)}, "top_k=None must be a list of 4 whole numbers"),
        ({"shared_heads": (4, 8, 4, 5), "top_k": (0, 0, 8)}, "top_k=.* must be a list of 4 whole numbers"),
        ({"shared_heads": (4, 8, 4, 5), "top_k": (0, 0, 13, 16)}, "Stage 3 has 16 heads, too few"),
        ({"shared_heads": (3, 8, 4, 5), "top_k": (0, 0, 8, 16)}, "Stage 1: top_k=0 leaves 1 of 4 heads unused"),
    ],
)
def test_impossible_combinations_are_refused(change, sentence):
    with pytest.raises(MixheadError, match=sentence):
        MoHTransNeXtConfig(**change)
