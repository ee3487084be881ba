"""What is saved comes back bit by bit through the Auto classes; a loader that does not know mixhead fails loudly."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from zoo import EVERY, ZOO, answer, same_bits, tokens

import mixhead
from mixhead import MoHConfig
from mixhead.models.hugging_face import MoHModelMixin, find_sites

CONFIG = MoHConfig(active=0.5, shared=0.25)


def described(config):
    """All that a configuration says, but for where it was loaded from and what saving and loading add."""

    def bare(values):
        added = ("_name_or_path", "architectures", "dtype", "transformers_version")
        return {key: bare(v) if isinstance(v, dict) else v for key, v in values.items() if key not in added}

    return bare(config.to_dict())


def assert_same_model(name, loaded, model):
    assert type(loaded) is type(model)
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(same_bits(found[key], expected[key]) for key in expected)
    assert loaded.config.moh == model.config.moh
    assert same_bits(answer(ZOO[name], loaded), answer(ZOO[name], model))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a converted model of every architecture, by name."""
    root = tmp_path_factory.mktemp("zoo")
    for name, animal in ZOO.items():
        mixhead.convert(animal.make(), CONFIG).save_pretrained(root / name)
    return root


@pytest.mark.parametrize(("name", "router"), EVERY)
def test_a_saved_model_comes_back_bit_by_bit(name, router, tmp_path):
    model = mixhead.convert(ZOO[name].make(), MoHConfig(active=0.5, shared=0.25, router=router))
    model.save_pretrained(tmp_path)
    loaded = ZOO[name].auto_class.from_pretrained(tmp_path)
    assert_same_model(name, loaded, model)
    assert described(loaded.config) == described(model.config)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert"])
def test_a_model_in_bfloat16_comes_back_in_bfloat16(name, saved, tmp_path):
    model = ZOO[name].auto_class.from_pretrained(saved / name, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_same_model(name, ZOO[name].auto_class.from_pretrained(tmp_path), model)
    assert json.loads((tmp_path / "config.json").read_text())["base_config"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ZOO)
def test_a_loaded_model_reverts_to_the_original(name, saved):
    loaded = mixhead.revert(ZOO[name].auto_class.from_pretrained(saved / name))
    original = ZOO[name].make()
    assert type(loaded) is type(original)
    assert described(loaded.config) == described(original.config)
    assert loaded.config._attn_implementation == original.config._attn_implementation
    assert same_bits(answer(ZOO[name], loaded), answer(ZOO[name], original))


def test_loading_twice_and_saving_again_changes_no_byte(saved, tmp_path):
    transformers.AutoModelForCausalLM.from_pretrained(saved / "llama").save_pretrained(tmp_path)
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        assert (tmp_path / file).read_bytes() == (saved / "llama" / file).read_bytes()


def test_sharded_saving(tmp_path):
    model = mixhead.convert(ZOO["llama"].make(), CONFIG)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_model("llama", transformers.AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_the_class_of_the_model_loads_it_too(saved):
    model = mixhead.convert(ZOO["llama"].make(), CONFIG)
    assert isinstance(type(model).from_pretrained(saved / "llama"), MoHModelMixin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "auto"])
def test_the_dtype_can_be_chosen_on_loading(dtype, saved):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved / "llama", dtype=dtype)
    expected = torch.float32 if dtype == "auto" else dtype
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}


def test_loading_onto_a_device_map(saved):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved / "llama", device_map="cpu")
    expected = transformers.AutoModelForCausalLM.from_pretrained(saved / "llama")
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert same_bits(answer(ZOO["llama"], loaded), answer(ZOO["llama"], expected))


@pytest.mark.parametrize("router", ["linear", "query_norm", "two_stage"])
def test_dense_weights_load_into_a_converted_class_with_routers_at_their_start_values(router, tmp_path):
    ZOO["llama"].make().save_pretrained(tmp_path)
    converted = mixhead.convert(ZOO["llama"].make(), MoHConfig(active=0.5, shared=0.25, router=router))
    loaded = type(converted).from_pretrained(tmp_path, config=copy.deepcopy(converted.config))
    assert torch.isfinite(answer(ZOO["llama"], loaded)).all()
    for site in find_sites(loaded):
        if router == "two_stage":
            assert not any(parameter.any() for parameter in site.module.moh_router.parameters())
        else:
            assert site.module.moh_router.shared_H.tolist() == [True, False, False, False]
        if router == "linear":
            assert not site.module.moh_skipped.any()


def test_the_file_names_its_own_model_type_and_nests_the_original_configuration(saved):
    config = json.loads((saved / "llama" / "config.json").read_text())
    assert (config["model_type"], config["base_model_type"]) == ("mixhead", "llama")
    assert config["architectures"] == ["MoHLlamaForCausalLM"]
    assert config["base_config"]["hidden_size"] == 32
    assert "hidden_size" not in config
    weights = load_file(saved / "llama" / "model.safetensors")
    assert "model.layers.0.self_attn.moh_router.score_proj.weight" in weights


STOCK_LOADER = """
import json, resource, sys
import transformers

# A stock configuration without its sizes describes a model of 7 billion parameters: it must not get that far.
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), size + (1 << 30)))
root, models = sys.argv[1], json.loads(sys.argv[2])
results = {}
for name, (model_class, auto_class) in models.items():
    for loader in (model_class, auto_class, "AutoConfig"):
        for arguments in ({}, {"dtype": "bfloat16"}, {"num_labels": 3}, {"ignore_mismatched_sizes": True}):
            if arguments and loader != model_class:
                continue
            try:
                getattr(transformers, loader).from_pretrained(f"{root}/{name}", **arguments)
                results[f"{name} {loader} {arguments}"] = "loaded"
            except Exception as error:
                results[f"{name} {loader} {arguments}"] = f"{type(error).__name__}: {error}"
assert "mixhead" not in sys.modules
print(json.dumps(results))
"""


def test_stock_classes_in_a_process_that_never_imported_mixhead_fail_loudly(saved):
    models = {name: (type(animal.make()).__name__, animal.auto_class.__name__) for name, animal in ZOO.items()}
    process = subprocess.run(
        [sys.executable, "-c", STOCK_LOADER, str(saved), json.dumps(models)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout)
    assert len(results) == 6 * len(ZOO)
    assert {attempt: error for attempt, error in results.items() if "mixhead" not in error} == {}


@pytest.mark.parametrize("name", ZOO)
def test_stock_classes_fail_loudly_beside_mixhead_too(name, saved):
    model_class = type(ZOO[name].make())
    for arguments in ({}, {"dtype": torch.bfloat16}, {"num_labels": 3}):
        with pytest.raises(Exception, match="mixhead"):
            model_class.from_pretrained(saved / name, **arguments)


def test_a_checkpoint_of_an_architecture_that_this_transformers_does_not_know(saved, tmp_path):
    config = json.loads((saved / "llama" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "base_model_type": "llama_of_tomorrow"}))
    with pytest.raises(
        mixhead.MixheadError, match="'llama_of_tomorrow', which the installed transformers does not know"
    ):
        transformers.AutoConfig.from_pretrained(tmp_path)


def test_lora_adapters_train_save_and_load_on_a_converted_model(saved, tmp_path):
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(saved / "llama")
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj", "o_proj"], modules_to_save=["moh_router"], task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, settings).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        adapted(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("moh_router" in name for name in trained)
    assert any("lora_A" in name for name in trained)
    adapted.eval().save_pretrained(tmp_path)

    fresh = transformers.AutoModelForCausalLM.from_pretrained(saved / "llama")
    before = answer(ZOO["llama"], fresh)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert same_bits(answer(ZOO["llama"], loaded), answer(ZOO["llama"], adapted))
    assert not torch.allclose(answer(ZOO["llama"], loaded), before)
    with mixhead.record_routing(loaded) as log:
        loaded.generate(input_ids=tokens(), max_new_tokens=2, do_sample=False)
    assert len(log.load()) == 2
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(answer(ZOO["llama"], merged), answer(ZOO["llama"], adapted), rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert same_bits(answer(ZOO["llama"], again), answer(ZOO["llama"], merged))


def test_the_checkpoint_names_no_path_of_the_machine_that_wrote_it(saved):
    text = (saved / "llama" / "config.json").read_text()
    assert str(Path.home()) not in text
    assert str(saved) not in text
