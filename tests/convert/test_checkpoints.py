"""What is saved comes back bit by bit; without mixhead all but the weights opens, and those fail loudly."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from zoo import EVERY, RENAMED, ZOO, answer, same_bits, tokens

import mixhead
from mixhead import MoHConfig
from mixhead.models.hugging_face import MoHModelMixin, find_sites

CONFIG = MoHConfig(active=0.5, shared=0.25)
ANIMALS = {**ZOO, **RENAMED}
NESTED = Path(__file__).parent / "nested_checkpoint"


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
    assert same_bits(answer(ANIMALS[name], loaded), answer(ANIMALS[name], model))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a converted model of every architecture, by name."""
    root = tmp_path_factory.mktemp("zoo")
    for name, animal in ZOO.items():
        mixhead.convert(animal.make(), CONFIG).save_pretrained(root / name)
    return root


@pytest.mark.parametrize(("name", "router"), EVERY + [(name, "linear") for name in RENAMED])
def test_a_saved_model_comes_back_bit_by_bit(name, router, tmp_path):
    model = mixhead.convert(ANIMALS[name].make(), MoHConfig(active=0.5, shared=0.25, router=router))
    model.save_pretrained(tmp_path)
    loaded, info = ANIMALS[name].auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_model(name, loaded, model)
    assert described(loaded.config) == described(model.config)
    assert (tmp_path / "README.md").read_text().count("mixhead.load")


@pytest.mark.parametrize("name", [*RENAMED, "gpt_neox", "vit", "clip"])
def test_a_new_model_that_was_never_loaded_comes_back_too(name, tmp_path):
    made = ANIMALS[name].make()
    model = mixhead.convert(type(made)(copy.deepcopy(made.config)).eval(), CONFIG)
    model.save_pretrained(tmp_path)
    assert_same_model(name, ANIMALS[name].auto_class.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("name", [*RENAMED, "gpt_neox", "vit", "clip"])
def test_the_weights_of_the_original_keep_their_names_in_the_file(name, tmp_path):
    model = ANIMALS[name].make()
    model.save_pretrained(tmp_path / "dense")
    mixhead.convert(model, CONFIG).save_pretrained(tmp_path / "converted")
    dense, converted = (load_file(tmp_path / kind / "model.safetensors") for kind in ("dense", "converted"))
    assert dense.keys() == {key for key in converted if "moh_" not in key}
    assert all(same_bits(converted[key], dense[key]) for key in dense)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert"])
def test_a_model_in_bfloat16_comes_back_in_bfloat16(name, saved, tmp_path):
    model = ZOO[name].auto_class.from_pretrained(saved / name, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_same_model(name, ZOO[name].auto_class.from_pretrained(tmp_path), model)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


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


def test_the_file_is_that_of_the_original_with_the_heads_and_what_keeps_weights_from_running_without_routing(saved):
    config = json.loads((saved / "llama" / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["hidden_size"]) == ("llama", ["LlamaForCausalLM"], 32)
    assert config["moh"]["layers"] == [{"num_heads": 4, "active_heads": 2, "shared_heads": 1}] * 2
    assert config["quantization_config"] == {"quant_method": "mixhead"}
    assert "`import mixhead`" in config["transformers_weights"]
    weights = load_file(saved / "llama" / "model.safetensors")
    assert "model.layers.0.self_attn.moh_router.score_proj.weight" in weights


def test_the_loaded_model_keeps_no_trace_of_how_it_was_loaded(saved):
    model = transformers.LlamaForCausalLM.from_pretrained(saved / "llama")
    assert not any(hasattr(model, name) for name in ("hf_quantizer", "is_quantized", "quantization_method"))
    assert not any(hasattr(model.config, name) for name in ("quantization_config", "transformers_weights"))


def test_a_card_that_stands_in_the_folder_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    mixhead.convert(ZOO["llama"].make(), CONFIG).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


STOCK_LOADER = """
import json, resource, sys
import transformers
transformers.PreTrainedModel  # brings PyTorch, whose libraries for GPUs alone are larger than the limit below

size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), size + (1 << 30)))
root, models = sys.argv[1], json.loads(sys.argv[2])
results = {}
for name, (model_class, auto_class) in models.items():
    config = transformers.AutoConfig.from_pretrained(f"{root}/{name}")
    assert type(config) is getattr(transformers, model_class).config_class, config
    assert type(config).from_pretrained(f"{root}/{name}").moh == config.moh
    attempts = {"from_config": lambda: getattr(transformers, auto_class).from_config(config)}
    attempts["class"] = lambda: getattr(transformers, model_class)(config)
    for loader in (model_class, auto_class):
        for arguments in (
            {}, {"dtype": "bfloat16"}, {"num_labels": 3}, {"ignore_mismatched_sizes": True}, {"config": config},
            {"attn_implementation": "eager"},
        ):
            load = getattr(transformers, loader).from_pretrained
            attempts[f"{loader} {[*arguments]}"] = lambda load=load, given=arguments: load(f"{root}/{name}", **given)
    for attempt, load in attempts.items():
        try:
            load()
            results[f"{name} {attempt}"] = "loaded"
        except Exception as error:
            results[f"{name} {attempt}"] = f"{type(error).__name__}: {error}"
assert "mixhead" not in sys.modules
print(json.dumps(results))
"""


def in_a_stock_process(program, *arguments):
    """What a program prints that knows nothing of mixhead."""
    process = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_stock_models_in_a_process_that_never_imported_mixhead_fail_loudly_and_configurations_open(saved):
    models = {name: (type(animal.make()).__name__, animal.auto_class.__name__) for name, animal in ZOO.items()}
    results = json.loads(in_a_stock_process(STOCK_LOADER, str(saved), json.dumps(models)))
    assert len(results) == 14 * len(ZOO)
    assert {attempt: error for attempt, error in results.items() if "mixhead" not in error} == {}
    loads = {attempt: error for attempt, error in results.items() if attempt.split()[1] not in ("from_config", "class")}
    assert {attempt: error for attempt, error in loads.items() if "`import mixhead`" not in error} == {}


def test_stock_tokenizers_and_processors_open_the_folder(saved, tmp_path):
    pytest.importorskip("PIL")
    words = Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "head": 1}, unk_token="<pad>"))
    for name, friend in {
        "llama": transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"),
        "vit": transformers.ViTImageProcessor(),
    }.items():
        model = transformers.AutoModel.from_pretrained(saved / name)
        mixhead.save(model, friend, tmp_path / name)
    program = "import sys, transformers as t\nroot = sys.argv[1]\n"
    program += "print(t.AutoTokenizer.from_pretrained(f'{root}/llama')('head').input_ids)\n"
    program += "print(type(t.AutoImageProcessor.from_pretrained(f'{root}/vit')).__name__, 'mixhead' in sys.modules)"
    ids, processor, knows_mixhead = in_a_stock_process(program, str(tmp_path)).split()
    assert (ids, knows_mixhead) == ("[1]", "False")
    assert processor.startswith("ViTImageProcessor")


@pytest.mark.parametrize("name", ZOO)
def test_beside_mixhead_the_classes_of_transformers_load_the_converted_model(name, saved):
    model_class = type(ZOO[name].make())
    expected = ZOO[name].auto_class.from_pretrained(saved / name)
    loaded = model_class.from_pretrained(saved / name)
    assert isinstance(loaded, MoHModelMixin)
    assert isinstance(loaded, model_class)
    assert_same_model(name, loaded, expected)


@pytest.mark.parametrize("name", ["llama", "bert", "clip"])
def test_no_stock_model_runs_from_the_configuration_of_a_converted_one(name, saved):
    config = transformers.AutoConfig.from_pretrained(saved / name)
    stock = type(ZOO[name].make())
    for described in (config, ZOO[name].auto_class.from_pretrained(saved / name).config):
        with pytest.raises(mixhead.MixheadError, match=r"was built without routers: load the model with mixhead\.load"):
            answer(ZOO[name], stock(copy.deepcopy(described)))


def test_a_checkpoint_of_an_earlier_version_loads_and_is_saved_in_the_form_of_today(tmp_path):
    expected = torch.tensor(json.loads((NESTED / "expected.json").read_text()))
    tokens_BN = torch.arange(3, 10)[None]
    for load in (transformers.AutoModelForCausalLM.from_pretrained, mixhead.load):
        model = load(NESTED, dtype=torch.float32)
        assert isinstance(model, MoHModelMixin)
        assert type(model.config).from_pretrained(NESTED).moh == model.config.moh
        torch.testing.assert_close(model(tokens_BN).logits[0], expected, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    assert same_bits(mixhead.load(tmp_path)(tokens_BN).logits, model(tokens_BN).logits)


@pytest.mark.parametrize("base_model_type", ["llama_of_tomorrow", None])
def test_an_earlier_checkpoint_of_an_architecture_that_this_transformers_does_not_know(base_model_type, tmp_path):
    config = json.loads((NESTED / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "base_model_type": base_model_type}))
    with pytest.raises(
        mixhead.MixheadError, match=f"{base_model_type!r}, which the installed transformers does not know"
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
