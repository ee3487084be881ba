"""Every entry of transformers' conversion mapping, the weights that it renames, splits or fuses at loading, comes back.

A tiny random model is made by cutting the sizes of each configuration class. What cannot be cut so, and what `convert`
refuses in a sentence, is skipped with the reason.
"""

import contextlib
import json

import pytest
import torch
import transformers as t
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
)

import mixhead
from mixhead import MixheadError, MoHConfig

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "d_model": 32, "hidden_dim": 32, "intermediate_size": 48,
    "ffn_hidden_size": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    "num_hidden_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_local_experts": 4,
    "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "decoder_sparse_step": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "image_size": 8, "patch_size": 4, "mlp_ratio": 2, "projection_dim": 16, "sliding_window": 4,
}  # fmt: skip
LARGEST = 20_000_000
KEYS = [key for key in _build_checkpoint_conversion_mapping() if key in CONFIG_MAPPING]
AT_LEAST = 70  # can be tried: fewer would say that this test is broken
tried: list[str] = []


def tiny(config_class):
    """A configuration of that class with small sizes, its parts too."""
    known = {*config_class.__dataclass_fields__, *config_class.attribute_map}
    sizes = {name: size for name, size in SIZES.items() if name in known}
    for part, spec in config_class.sub_configs_defaults.items():
        with contextlib.suppress(Exception):  # of a part that cannot be cut the defaults are taken
            chosen = spec.config_class
            cut = tiny(chosen if issubclass(chosen, t.PreTrainedConfig) else spec.get_config_class(spec.model_type))
            sizes[part] = cut.to_dict()
    return config_class(**sizes)


def tiny_model(key):
    """A tiny random model of a model type; skips where there is none."""
    try:
        config = tiny(CONFIG_MAPPING[key])
        mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING)
        model_class = next(mapping[type(config)] for mapping in mappings if type(config) in mapping)
        model_class = model_class[0] if isinstance(model_class, tuple) else model_class
        with torch.device("meta"):
            size = model_class(tiny(CONFIG_MAPPING[key])).num_parameters()
        if size > LARGEST:
            pytest.skip(f"{size} parameters: its sizes have other names")
        return model_class(config).eval()
    except Exception as error:
        pytest.skip(f"no tiny model of it can be made so: {type(error).__name__}")


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_a_converted_model_of_it_comes_back(key, tmp_path):
    new = tiny_model(key)
    try:
        new.save_pretrained(tmp_path / "dense")
        # As published models are: loaded. (By the configuration, since some run under the class of another.)
        model, info = type(new).from_pretrained(tmp_path / "dense", config=new.config, output_loading_info=True)
    except Exception as error:
        pytest.skip(f"transformers does not save and load it: {type(error).__name__}")
    if any(info.values()):
        pytest.skip("transformers does not load what it saved")
    try:
        mixhead.convert(model, MoHConfig(active=0.5))
    except MixheadError as refusal:
        pytest.skip(str(refusal))
    model.save_pretrained(tmp_path / "converted")
    config = t.AutoConfig.from_pretrained(tmp_path / "converted")
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["model_type"] == config.model_type
    loaded, info = type(new).from_pretrained(tmp_path / "converted", config=config, output_loading_info=True)
    assert not any(info.values())
    found, expected = loaded.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    tried.append(key)


@pytest.mark.slow
def test_most_entries_could_be_tried():
    if not tried:
        pytest.skip("the entries were not run")
    assert len(tried) >= AT_LEAST
