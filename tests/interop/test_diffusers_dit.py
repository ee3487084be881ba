"""Dense DiTs of diffusers: the same numbers here and there."""

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed")

import json

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from mixhead.errors import MixheadError
from mixhead.interop import load_diffusers_dit
from mixhead.interop.diffusers_dit import from_diffusers, is_diffusers_dit

SIZES = {
    "num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 4, "num_layers": 2, "sample_size": 8,
    "num_embeds_ada_norm": 10,
}  # fmt: skip


def make(**changes):
    """With one embedding of time and class for all blocks, as every converted or trained DiT has."""
    model = DiTTransformer2DModel(**{**SIZES, "out_channels": 8, **changes}).eval()
    first, *others = model.transformer_blocks
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return model


@pytest.mark.parametrize("changes", [{}, {"out_channels": 4}, {"attention_bias": False, "patch_size": 4}])
def test_the_same_numbers(changes, tmp_path):
    theirs = make(**changes)
    theirs.save_pretrained(tmp_path)
    ours = load_diffusers_dit(tmp_path)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 10])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, y), theirs(x, t, y).sample, rtol=0, atol=1e-5)


def test_the_folder_of_a_pipeline(tmp_path):
    DiTPipeline(make(), None, DDIMScheduler()).save_pretrained(tmp_path / "p")
    assert is_diffusers_dit(tmp_path / "p")
    assert load_diffusers_dit(tmp_path / "p", torch.bfloat16).patch_embed.weight.dtype == torch.bfloat16


def test_folders_that_hold_none(tmp_path):
    assert not is_diffusers_dit(tmp_path)
    with pytest.raises(MixheadError, match="holds no DiT of diffusers that can be read"):
        load_diffusers_dit(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    assert not is_diffusers_dit(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert not is_diffusers_dit(tmp_path)


def test_variants_that_no_dit_has():
    model = make()
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias.add_(1.0)
    with pytest.raises(MixheadError, match="differs from the first block's"):
        from_diffusers(model.config, model.state_dict())
    for changes in ({"activation_fn": "geglu"}, {"dropout": 0.1}, {"norm_elementwise_affine": True}):
        model = make(**changes)
        with pytest.raises(MixheadError, match="is no DiT"):
            from_diffusers(model.config, model.state_dict())
