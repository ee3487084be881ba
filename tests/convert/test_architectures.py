"""Architectures that do what most do not: they pass no keywords down, name and wrap their layers in ways of their own.

Each is converted, calibrated, trained, saved, loaded and, where it writes, generates with a cache as without. Those
whose attention is more than queries, keys, values and a mask are refused in a sentence before anything is changed.
"""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import transformers as t
from zoo import GROUPED, IMAGE, SIZES, pixels, random_model, same_bits, tokens

import mixhead
from mixhead import CalibrationConfig, MixheadError, MoHConfig

LATENT = {
    **SIZES, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 12, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 6, "head_dim": 8, "n_routed_experts": 2, "num_experts_per_tok": 1,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
VIT = {**IMAGE, "intermediate_size": 48}
TOWER = {"depth": 2, "num_heads": 4, "patch_size": 2, "temporal_patch_size": 1, "spatial_merge_size": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def ids():
    return {"input_ids": tokens()}


def images():
    return {"pixel_values": pixels()}


def patches(width=12):
    """Two images of 4 x 4 and 2 x 4 patches in one row, as vision towers for images of any size take them."""
    torch.manual_seed(0)
    return {"hidden_states": torch.randn(24, width), "grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4]])}


def question():
    """A text of seven tokens and an image of 4 x 4 patches that stands at four of them, for each of two samples."""
    text = tokens()
    text[:, 2:6] = 3
    return {
        "input_ids": text, "mm_token_type_ids": (text == 3).int(), "pixel_values": torch.randn(32, 12),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
    }  # fmt: skip


def video():
    return {"pixel_values": torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(2))}


def sound():
    return {"input_features": torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(2))}


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**GROUPED, "rope_parameters": rope}
    return t.Qwen2VLConfig(
        text_config=text, vision_config={**TOWER, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}, image_token_id=3,
        vision_start_token_id=60, vision_end_token_id=61, video_token_id=62,
    )  # fmt: skip


def florence2():
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    text = t.BartConfig(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, **heads)
    vision = {"embed_dim": [16], "num_heads": [4], "num_groups": [4], "depths": [1], "patch_size": [3],
              "patch_stride": [2], "patch_padding": [1], "patch_prenorm": [False], "window_size": 2,
              "projection_dim": 32}  # fmt: skip
    return t.Florence2Config(text_config=text, vision_config=vision, image_token_id=3)


# Model class, configuration, inputs.
DEVIANTS: dict[str, tuple[type[t.PreTrainedModel], Callable[[], t.PreTrainedConfig], Callable[[], dict]]] = {
    "deepseek_v2": (t.DeepseekV2ForCausalLM, lambda: t.DeepseekV2Config(**LATENT), ids),  # values narrower than keys
    "deepseek_v3": (t.DeepseekV3ForCausalLM, lambda: t.DeepseekV3Config(**LATENT), ids),
    "siglip": (  # attention that passes no keywords
        t.SiglipForImageClassification, lambda: t.SiglipConfig(text_config=SIZES, vision_config=VIT), images,
    ),
    "idefics3": (t.Idefics3VisionTransformer, lambda: t.Idefics3Config(vision_config=VIT).vision_config, images),
    "videomae": (  # attention that takes none
        t.VideoMAEForVideoClassification,
        lambda: t.VideoMAEConfig(**VIT, **NO_DROPOUT, num_frames=4, tubelet_size=2), video,
    ),
    "vjepa2": (
        t.VJEPA2Model,
        lambda: t.VJEPA2Config(
            crop_size=8, patch_size=4, frames_per_clip=4, hidden_size=48, num_attention_heads=4, num_hidden_layers=2,
            pred_hidden_size=48, pred_num_attention_heads=4, pred_num_hidden_layers=1, num_pooler_layers=1,
        ),
        lambda: {"pixel_values_videos": video()["pixel_values"]},
    ),
    "stablelm": (t.StableLmForCausalLM, lambda: t.StableLmConfig(**GROUPED), ids),  # layers that pass none on
    "nemotron": (t.NemotronForCausalLM, lambda: t.NemotronConfig(**GROUPED, head_dim=8), ids),
    "mobilebert": (  # queries come from narrower states, and not from the first argument's name
        t.MobileBertForMaskedLM,
        lambda: t.MobileBertConfig(
            **SIZES, embedding_size=32, intra_bottleneck_size=16, num_feedforward_networks=1, **NO_DROPOUT
        ),
        ids,
    ),
    "ctrl": (  # values, keys and queries, in this order
        t.CTRLLMHeadModel,
        lambda: t.CTRLConfig(vocab_size=64, n_positions=64, n_embd=32, dff=48, n_layer=2, n_head=4, resid_pdrop=0.0,
                             embd_pdrop=0.0),
        ids,
    ),
    "swin": (  # one bias for all samples in the place of the mask
        t.SwinForImageClassification,
        lambda: t.SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4),
        lambda: {"pixel_values": pixels(16)},
    ),
    "distilbert": (  # output projections with names of their own
        t.DistilBertForMaskedLM,
        lambda: t.DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4, dropout=0.0,
                                   attention_dropout=0.0),
        ids,
    ),
    "modernbert": (t.ModernBertForMaskedLM, lambda: t.ModernBertConfig(**SIZES, local_attention=4), ids),
    "moshi": (  # and wrapped in another layer
        t.MoshiForCausalLM, lambda: t.MoshiConfig(**SIZES, head_dim=8, ffn_dim=48, sliding_window=64), ids,
    ),
    "qwen3_vl": (  # images of any size in one row
        t.Qwen3VLVisionModel,
        lambda: t.Qwen3VLConfig(
            vision_config={**TOWER, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32,
                           "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        ).vision_config,
        patches,
    ),
    "qwen2_vl": (t.Qwen2VLForConditionalGeneration, qwen2_vl, question),
    "parakeet": (  # scores of relative positions in the place of the mask
        t.ParakeetEncoder,
        lambda: t.ParakeetEncoderConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_mel_bins=16,
            subsampling_conv_channels=8, dropout=0.0, layerdrop=0.0,
        ),
        sound,
    ),
    "jamba": (  # a hybrid
        t.JambaForCausalLM,
        lambda: t.JambaConfig(**GROUPED, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4,
                              mamba_dt_rank=4, use_mamba_kernels=False),
        ids,
    ),
}  # fmt: skip


@functools.cache
def original(name):
    model_class, config, _ = DEVIANTS[name]
    return random_model(model_class, config())


def make(name):
    return copy.deepcopy(original(name))


@torch.no_grad()
def answer(name, model):
    """The first output."""
    torch.manual_seed(0)
    return model(**DEVIANTS[name][2](), return_dict=True)[0]


@pytest.mark.parametrize("name", DEVIANTS)
def test_with_all_heads_it_computes_the_same_bits_and_is_itself_again(name):
    model = make(name)
    expected = answer(name, model)
    kinds = [type(module) for module in model.modules()]
    assert same_bits(answer(name, mixhead.convert(model, MoHConfig(active=1.0))), expected)
    mixhead.revert(mixhead.convert(mixhead.revert(model), MoHConfig(active=0.5)))
    assert [type(module) for module in model.modules()] == kinds
    assert same_bits(answer(name, model), expected)


@pytest.mark.parametrize("name", DEVIANTS)
def test_it_is_calibrated_saved_and_loaded(name, tmp_path):
    model = mixhead.convert(make(name), MoHConfig(active=0.5))
    report = mixhead.calibrate(model, [DEVIANTS[name][2]()], CalibrationConfig(dense_layers=0))
    assert 0.0 < sum(layer.expected_loss for layer in report.layers) / len(report.layers) < 1.0
    expected = answer(name, model)
    assert expected.isfinite().all() and not torch.equal(expected, answer(name, original(name)))
    model.save_pretrained(tmp_path)
    loaded = type(model).base_model_class.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(answer(name, loaded), expected)


@pytest.mark.parametrize("name", DEVIANTS)
def test_every_router_is_trained(name):
    config = MoHConfig(active=0.5, router="two_stage", balance_coefficient=0.1)
    model = mixhead.convert(make(name), config).train()
    outputs = model(**DEVIANTS[name][2](), return_dict=True)
    outputs[0].float().square().mean().backward()
    routers = {n: p.grad for n, p in model.named_parameters() if "moh_router" in n}
    assert routers and all(grad is not None and grad.isfinite().all() for grad in routers.values())
    assert all(grad.any() for n, grad in routers.items() if "routed_proj" in n)


def test_heads_that_no_output_projection_follows():
    """In the pooler of V-JEPA 2 the heads side by side are the output."""
    model, inputs = t.VJEPA2ForVideoClassification(DEVIANTS["vjepa2"][1]()).eval(), DEVIANTS["vjepa2"][2]()
    with torch.no_grad():
        expected = model(**inputs).logits
        assert same_bits(mixhead.convert(model, MoHConfig(active=1.0))(**inputs).logits, expected)
        mixhead.convert(mixhead.revert(model), MoHConfig(active=0.5))
        assert model.pooler.cross_attention_layer.cross_attn.moh_router is not None
        assert not torch.equal(model(**inputs).logits, expected)


def test_output_projections_that_take_gated_heads_are_not_fitted_to_bare_ones(caplog):
    layers = {"layer_types": ["full_attention", "full_attention"], "head_dim": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    config = t.Qwen3NextConfig(**GROUPED, **layers, **experts, shared_expert_intermediate_size=16)
    model = mixhead.convert(random_model(t.Qwen3NextForCausalLM, config), MoHConfig(active=0.5))
    before = copy.deepcopy(model.state_dict())
    mixhead.calibrate(model, [ids()])
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items() if "o_proj" in key)
    assert "take heads that were gated" in caplog.text


WRITERS = [name for name, (model_class, _, inputs) in DEVIANTS.items() if inputs is ids and "LM" in model_class.__name__
           and "Masked" not in model_class.__name__]  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_it_writes_with_a_cache_as_without(name):
    model = mixhead.convert(make(name), MoHConfig(active=0.5))
    written = [
        model.generate(**ids(), max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]
    assert torch.equal(*written)


@pytest.mark.parametrize("name", ["stablelm", "siglip", "nemotron"])
def test_checkpointed_layers_run_again_as_they_did(name):
    """In the backward pass, with the engine of the first time, and recording nothing twice."""
    gradients = []
    for checkpointing in ("none", "before", "after"):
        torch.manual_seed(0)
        model = make(name)
        if checkpointing == "before":
            model.gradient_checkpointing_enable()
        mixhead.convert(model, MoHConfig(active=0.5, router="two_stage", balance_coefficient=0.1)).train()
        if checkpointing == "after":
            model.gradient_checkpointing_enable()
        outputs = model(**DEVIANTS[name][2](), head_attention_impl="gathered")
        outputs[0].square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for found in gradients[1:]:
        assert found.keys() == gradients[0].keys()
        for key, gradient in gradients[0].items():
            torch.testing.assert_close(found[key], gradient)


DSA = {**LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
REFUSED = {
    "chooses keys for every query": lambda: t.DeepseekV32ForCausalLM(t.DeepseekV32Config(**DSA)),
    "does not tell its num_heads": lambda: t.Florence2ForConditionalGeneration(florence2()),  # its channels attend
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_computed_is_refused_and_left_as_it_was(sentence):
    model = REFUSED[sentence]()
    state, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    configuration = model.config.to_dict()
    with pytest.raises(MixheadError, match=f"cannot be converted: .*{sentence}"):
        mixhead.convert(model)
    assert [type(module) for module in model.modules()] == kinds
    assert model.config.to_dict() == configuration and "moh" not in configuration
    assert all(torch.equal(weight, state[key]) for key, weight in model.state_dict().items())
