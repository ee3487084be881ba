"""The Auto classes of transformers know the model types of this library, which is loaded when a model is needed."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mixhead
from mixhead.models.moa import MoAEncoderConfig, MoAForMaskedLM, MoATransformerConfig
from mixhead.models.moa import MoATransformerForConditionalGeneration as MoATransformer
from mixhead.models.moh_vit import MoHTransNeXtConfig, MoHTransNeXtForImageClassification, image_processor


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One saved model of every model type."""
    torch.manual_seed(0)
    here = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_heads": 4, "head_dim": 8}
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    images = MoHTransNeXtConfig(
        image_size=32, hidden_sizes=(8, 16), num_heads=(2, 4), depths=(1, 1), mlp_ratios=(2, 2), pool_ratios=(2, 1),
        shared_heads=(1, 1), top_k=(1, 2),
    )  # fmt: skip
    models = {
        "causal_lm": mixhead.convert(llama, mixhead.MoHConfig(active=0.5)),
        "seq2seq": MoATransformer(MoATransformerConfig(**sizes, active_heads=2, encoder_layers=1, decoder_layers=1)),
        "masked_lm": MoAForMaskedLM(MoAEncoderConfig(**sizes, active_heads=2, num_hidden_layers=1)),
        "image": MoHTransNeXtForImageClassification(images),
    }
    for name, model in models.items():
        model.save_pretrained(here / name)
    image_processor(images).save_pretrained(here / "image")
    (here / "config.pickle").write_bytes(pickle.dumps(models["seq2seq"].config))
    (here / "converted.pickle").write_bytes(pickle.dumps(models["causal_lm"].config))
    return here


def in_a_new_process(program: str, folders) -> str:
    """What a program prints that knows nothing of this one; it is run beside the saved models."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=folders, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


LOADED = {
    ("AutoModelForCausalLM", "causal_lm"): "LlamaForCausalLM",
    ("AutoModel", "causal_lm"): "LlamaModel",
    ("AutoModelForSeq2SeqLM", "seq2seq"): "MoATransformerForConditionalGeneration",
    ("AutoModelForMaskedLM", "masked_lm"): "MoAForMaskedLM",
    ("AutoModelForImageClassification", "image"): "MoHTransNeXtForImageClassification",
    ("AutoModel", "image"): "MoHTransNeXtModel",
}


@pytest.mark.parametrize(
    "start",
    [
        "import mixhead, transformers",
        "from transformers import AutoConfig, PreTrainedModel\nimport mixhead, transformers",
    ],
    ids=["mixhead first", "transformers first"],
)
def test_folders_are_loaded_after_nothing_but_import_mixhead(start, folders):
    program = f"{start}\nfor auto, folder in {[*LOADED]!r}:\n"
    program += "    model = getattr(transformers, auto).from_pretrained(folder)\n"
    program += "    routers = [name for name, _ in model.named_modules() if name.endswith('router')]\n"
    program += "    print(type(model).__name__, len(routers) > 0)"
    assert in_a_new_process(program, folders).splitlines() == [f"{name} True" for name in LOADED.values()]


def test_a_configuration_is_enough_for_a_model_a_pickled_one_too(folders):
    program = (
        "import pickle\n"
        "import transformers\n"
        "config = pickle.load(open('config.pickle', 'rb'))\n"
        "print(type(transformers.AutoModelForSeq2SeqLM.from_config(config)).__name__)\n"
        "autos = {'masked_lm': 'MaskedLM', 'image': 'ImageClassification'}\n"
        "for folder, auto in autos.items():\n"
        "    config = transformers.AutoConfig.from_pretrained(folder)\n"
        "    print(type(getattr(transformers, f'AutoModelFor{auto}').from_config(config)).__name__)"
    )
    wanted = ["seq2seq", "masked_lm", "image"]
    made = {folder: name for (auto, folder), name in LOADED.items() if auto != "AutoModel"}
    assert in_a_new_process(program, folders).split() == [made[folder] for folder in wanted]


def test_the_configuration_of_a_converted_model_is_enough_for_another_a_pickled_one_too(folders):
    program = (
        "import pickle, transformers\n"
        "config = pickle.load(open('converted.pickle', 'rb'))\n"
        "model = transformers.AutoModelForCausalLM.from_config(config)\n"
        "print(type(model).__name__, model.model.layers[0].self_attn.moh_router is not None)"
    )
    assert in_a_new_process(program, folders) == "LlamaForCausalLM True"


def test_pipelines_and_compiled_models(folders):
    pytest.importorskip("PIL")
    program = (
        "import mixhead, torch, transformers\n"
        "from PIL import Image\n"
        "pipe = transformers.pipeline('image-classification', model='image')\n"
        "print(type(pipe.model).__name__, len(pipe(Image.new('RGB', (32, 32)))))\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained('causal_lm').eval()\n"
        "tokens = torch.arange(12).view(1, 12)\n"
        "compiled = torch.compile(model, backend='eager')\n"
        "print(torch.allclose(compiled(tokens).logits, model(tokens).logits, atol=1e-5))"
    )
    assert in_a_new_process(program, folders).split() == ["MoHTransNeXtForImageClassification", "2", "True"]


def test_a_configuration_may_be_imported_before_transformers():
    program = "import mixhead.models.hugging_face.configuration\nfrom transformers import CONFIG_MAPPING\n"
    program += "print(*(name in CONFIG_MAPPING for name in ('mixhead', 'moa_encoder', 'moa_transformer', 'moh_vit')))"
    assert in_a_new_process(program, ".") == "True True True True"


def test_looking_up_the_table_of_configurations_is_not_loading_it():
    program = (
        "import importlib.util, mixhead, transformers\n"
        "importlib.util.find_spec('transformers.models.auto.configuration_auto')\n"
        "from transformers import CONFIG_MAPPING\n"
        "print('moh_vit' in CONFIG_MAPPING)"
    )
    assert in_a_new_process(program, ".") == "True"
