"""Weights are called, not read: whole models compute the same while accelerate keeps their weights elsewhere."""

import copy

import accelerate
import pytest
import torch
from transformers import JetMoeConfig, JetMoeForCausalLM

import mixhead
from mixhead import CalibrationConfig, MixheadError, MoHConfig
from mixhead.models.moa import MoATransformerConfig, MoATransformerForConditionalGeneration
from mixhead.models.moh_dit import MoHDiT, MoHDiTConfig
from mixhead.models.moh_vit import MoHTransNeXtConfig, MoHTransNeXtForImageClassification

CPU = torch.device("cpu")
DIT = {"sample_size": 8, "in_channels": 4, "hidden_size": 48, "depth": 2, "num_heads": (3, 4), "head_dim": 12}
JETMOE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_key_value_heads": 2, "kv_channels": 16,
    "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def moh_vit():
    sizes = {"image_size": 64, "hidden_sizes": (12, 24, 48, 48), "num_heads": (2, 4, 4, 4), "depths": (1, 1, 1, 1)}
    routed = {"mlp_ratios": (4, 4, 2, 2), "num_labels": 5, "shared_heads": (2, 1, 2, 0), "top_k": (0, 2, 1, 2)}
    model = MoHTransNeXtForImageClassification(MoHTransNeXtConfig(**sizes, **routed))
    return model, {"pixel_values": torch.randn(2, 3, 64, 64)}


def moh_dit(**changes):
    model = MoHDiT(MoHDiTConfig(**DIT, num_classes=5, **changes))
    inputs = {"x": torch.randn(2, 4, 8, 8), "t": torch.tensor([3, 500]), "y": torch.tensor([0, 4])}
    return model, inputs


def converted_dit(router):
    model, inputs = moh_dit()
    mixhead.convert(model, MoHConfig(active=0.5, router=router))
    for _, attention in model.named_attention():
        if attention.skipped_HD is not None:
            attention.skipped_HD.normal_()  # so that constants stand in for skipped heads
    return model, inputs


def moa():
    sizes = {
        "vocab_size": 40,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_heads": 5,
        "active_heads": 2,
        "head_dim": 8,
    }
    model = MoATransformerForConditionalGeneration(MoATransformerConfig(**sizes, encoder_layers=1, decoder_layers=1))
    return model, {"input_ids": torch.randint(4, 40, (2, 7)), "labels": torch.randint(4, 40, (2, 6))}


def jetmoe():
    model = JetMoeForCausalLM(JetMoeConfig(**JETMOE, initializer_range=0.2))
    return mixhead.convert(model), {"input_ids": torch.randint(3, 64, (2, 9))}


MODELS = {
    "MoH-ViT": moh_vit,
    "MoH-DiT": lambda: moh_dit(shared_heads=(1, 2), top_k=(1, 1)),
    "MoH-DiT, linear": lambda: converted_dit("linear"),
    "MoH-DiT, query norm": lambda: converted_dit("query_norm"),
    "MoA": moa,
    "JetMoE": jetmoe,
}


def make(name):
    """The model with random weights in every place, and inputs."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval(), inputs


def output(model, inputs):
    with torch.no_grad():
        found = model(**inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


def on_cpu(model, _folder):
    return accelerate.cpu_offload(model, CPU)


def on_disk(model, folder):
    return accelerate.disk_offload(model, folder, CPU)


def dispatched(model, folder):
    parts = {name: "disk" for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))}
    return accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("offload", [on_cpu, on_disk, dispatched])
@pytest.mark.parametrize("name", MODELS)
def test_an_offloaded_model_computes_what_it_did(name, offload, tmp_path):
    model, inputs = make(name)
    expected = output(model, inputs)
    assert expected.isfinite().all()
    offload(model, str(tmp_path))
    for _ in range(2):
        torch.testing.assert_close(output(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_dit_that_is_offloaded_already_is_converted_and_calibrated(caplog):
    torch.manual_seed(0)
    model, inputs = moh_dit()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    expected = output(model, inputs)
    accelerate.cpu_offload(model, CPU)
    mixhead.convert(model, MoHConfig(active=1.0))
    torch.testing.assert_close(output(model, inputs), expected)
    mixhead.convert(mixhead.revert(model), MoHConfig(active=0.5))
    assert {
        p.device.type for _, a in model.named_attention() if a.router is not None for p in a.router.parameters()
    } == {"cpu"}
    found = mixhead.calibrate(model, [inputs], CalibrationConfig(pilot_batches=1))
    assert found.active_share <= 0.75
    assert output(model, inputs).isfinite().all()
    assert "output projections" in caplog.text


def test_a_jetmoe_that_is_offloaded_already_is_refused():
    model = accelerate.cpu_offload(JetMoeForCausalLM(JetMoeConfig(**JETMOE)), CPU)
    with pytest.raises(MixheadError, match="JetMoeForCausalLM is offloaded or wrapped: convert it first"):
        mixhead.convert(model)


@pytest.mark.parametrize("name", ["MoH-DiT", "MoH-DiT, linear", "MoA"])
def test_adapters_on_every_projection_change_nothing_until_they_are_trained(name):
    peft = pytest.importorskip("peft")
    model, inputs = make(name)
    expected = output(model, inputs)
    linear = [n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=[*{*linear}]), copy.deepcopy(model))
    torch.testing.assert_close(output(adapted, inputs), expected, rtol=1e-4, atol=1e-5)
    for layer, parameter in adapted.named_parameters():
        if "lora_B" in layer:
            torch.nn.init.normal_(parameter)
    assert not torch.allclose(output(adapted, inputs), expected)
