"""Weights are called, not read: converted models under accelerate's hooks, adapters and quantised weights."""

import copy

import accelerate
import pytest
import torch
import transformers as t
from zoo import ZOO, answer, same_bits, tokens

import mixhead
from mixhead import MixheadError, MoHConfig

CPU = torch.device("cpu")
ROUTERS = ["linear", "two_stage", "query_norm"]


def on_cpu(model, _folder):
    return accelerate.cpu_offload(model, CPU)


def on_disk(model, folder):
    return accelerate.disk_offload(model, folder, CPU)


def dispatched(model, folder):
    parts = {name: "disk" for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))}
    return accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=folder, force_hooks=True)


OFFLOADS = pytest.mark.parametrize("offload", [on_cpu, on_disk, dispatched])


def routed(model, router):
    """The model, converted, with routers that differ from token to token."""
    mixhead.convert(model, MoHConfig(active=0.5, router=router))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moh_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@OFFLOADS
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "whisper"])
def test_a_converted_model_computes_the_same_bits_offloaded(name, router, offload, tmp_path):
    model = routed(ZOO[name].make(), router)
    expected = answer(ZOO[name], model)
    offload(model, str(tmp_path))
    assert same_bits(answer(ZOO[name], model), expected)
    assert same_bits(answer(ZOO[name], model), expected)


@OFFLOADS
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_an_offloaded_model_is_converted(name, router, offload, tmp_path):
    expected = answer(ZOO[name], routed(ZOO[name].make(), router))
    model = offload(ZOO[name].make(), str(tmp_path))
    assert same_bits(answer(ZOO[name], routed(model, router)), expected)
    dense = answer(ZOO[name], ZOO[name].make())
    assert same_bits(answer(ZOO[name], mixhead.revert(model)), dense)


def test_an_attention_module_with_weights_of_its_own_is_fed_under_hooks():
    """accelerate replaces its forward, so that no class of ours is asked; SigLIP's takes no keywords."""
    config = t.SiglipVisionConfig(
        image_size=8, patch_size=4, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.manual_seed(0)
        model = t.SiglipVisionModel(config).eval()
        expected = routed(copy.deepcopy(model), "linear")(pixels).last_hidden_state
        for module in model.modules():
            if hasattr(module, "num_heads"):
                accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
        found = routed(model, "linear")
        assert same_bits(found(pixels).last_hidden_state, expected)
        assert not any("moh_input" in vars(module) for module in found.modules())


@OFFLOADS
def test_an_offloaded_model_is_calibrated_and_writes(offload, tmp_path, caplog):
    model = mixhead.convert(offload(ZOO["llama"].make(), str(tmp_path)), MoHConfig(active=0.5))
    twin = mixhead.convert(ZOO["llama"].make(), MoHConfig(active=0.5))
    for each in (model, twin):
        mixhead.calibrate(each, [tokens()], mixhead.CalibrationConfig(refit_output=False))
    assert same_bits(answer(ZOO["llama"], model), answer(ZOO["llama"], twin))
    written = [each.generate(tokens(), max_new_tokens=3, do_sample=False) for each in (model, twin)]
    assert torch.equal(*written)
    mixhead.calibrate(model, [tokens()])
    assert "layers are quantised, adapted, offloaded or wrapped" in caplog.text


def test_routers_that_are_offloaded_cannot_be_calibrated():
    model = on_cpu(mixhead.convert(ZOO["llama"].make(), MoHConfig(active=0.5)), None)
    expected = answer(ZOO["llama"], model)
    with pytest.raises(MixheadError, match="The routers of this model are offloaded"):
        mixhead.calibrate(model, [tokens()])
    assert same_bits(answer(ZOO["llama"], model), expected)


def test_constants_cannot_be_put_beside_offloaded_weights():
    config = t.ParakeetEncoderConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, num_mel_bins=16,
        subsampling_conv_channels=8, dropout=0.0, layerdrop=0.0,
    )  # fmt: skip
    model, sound = on_cpu(t.ParakeetEncoder(config).eval(), None), torch.randn(1, 40, 16)
    with torch.no_grad():
        expected = model(sound).last_hidden_state
        with pytest.raises(MixheadError, match=r"The weights of layers\.0\.self_attn itself are offloaded"):
            mixhead.convert(model, MoHConfig(active=0.5))
        assert same_bits(model(sound).last_hidden_state, expected)
        mixhead.convert(model, MoHConfig(active=1.0))
        assert same_bits(model(sound).last_hidden_state, expected)


def test_a_forward_that_somebody_replaced_is_refused():
    model = ZOO["llama"].make()
    model.forward = lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)
    with pytest.raises(MixheadError, match="The forward of this LlamaForCausalLM was replaced"):
        mixhead.convert(model)
    assert type(model) is t.LlamaForCausalLM and not hasattr(model.config, "moh")


@pytest.mark.parametrize("router", ROUTERS)
def test_a_converted_folder_is_loaded_offloaded(router, tmp_path):
    model = routed(ZOO["llama"].make(), router)
    model.save_pretrained(tmp_path / "model")
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "disk", "model.norm": "disk"}
    loaded = t.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={**parts, "model.rotary_emb": "cpu", "lm_head": "cpu"},
        offload_folder=tmp_path / "offload",
    )
    assert loaded.model.layers[1].self_attn.moh_router is not None
    assert any(parameter.is_meta for parameter in loaded.parameters())
    assert same_bits(answer(ZOO["llama"], loaded), answer(ZOO["llama"], model))


@pytest.mark.parametrize("router", ["linear", "two_stage"])
def test_adapters_on_routers_and_output_projections_are_called(router):
    peft = pytest.importorskip("peft")
    model = routed(ZOO["llama"].make(), router)
    expected = answer(ZOO["llama"], model)
    config = peft.LoraConfig(target_modules=["o_proj", "score_proj", "routed_proj", "shared_proj", "stage_proj"])
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(answer(ZOO["llama"], adapted), expected)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name and "moh_router" in name:
            torch.nn.init.normal_(parameter, std=3.0)
    assert not torch.allclose(answer(ZOO["llama"], adapted), expected)
    adapted.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert any("moh_router" in name for name in trained)


class Int8Linear(torch.nn.Module):
    """A linear layer as bitsandbytes replaces it: whole numbers and a scale for each row."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), False)

    def forward(self, states):
        return torch.nn.functional.linear(states, self.weight * self.scale, self.bias)


def quantised(name):
    model = ZOO[name].make()
    for module in [*model.modules()]:
        for child, layer in [*module.named_children()]:
            if type(layer) is torch.nn.Linear and layer is not model.get_output_embeddings():
                setattr(module, child, Int8Linear(layer))
    return model


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_quantised_weights(name, router, tmp_path, caplog):
    model, dense = quantised(name), answer(ZOO[name], quantised(name))
    assert same_bits(answer(ZOO[name], mixhead.convert(model, MoHConfig(active=1.0))), dense)
    routed(mixhead.revert(model), router)
    assert {p.dtype for n, p in model.named_parameters() if "moh_" in n} <= {torch.float32}
    assert answer(ZOO[name], model).isfinite().all()
    if router == "linear":
        report = mixhead.calibrate(model, [tokens(), tokens()])
        assert 0.0 < report.layers[-1].expected_loss < 1.0
        assert "quantised" in caplog.text
    model.config.quantization_config = {"quant_method": "int8"}
    with pytest.raises(MixheadError, match="are quantised, and cannot be saved so"):
        model.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("when", ["before", "after"])
def test_int8_weights_of_torchao(when):
    torchao = pytest.importorskip("torchao.quantization")
    model = ZOO["llama"].make()
    if when == "before":
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        dense = answer(ZOO["llama"], model)
        assert same_bits(answer(ZOO["llama"], mixhead.convert(model, MoHConfig(active=1.0))), dense)
        mixhead.revert(model)
    mixhead.convert(model, MoHConfig(active=0.5))
    if when == "after":
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert answer(ZOO["llama"], model).isfinite().all()
