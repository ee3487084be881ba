"""Tools that ask a model for its class, `model_type` or folder get from a converted one what the original gives.

With all heads active a converted model computes the bits of the original, so every tool must give the same as well.
"""

import copy
import io
import pickle

import pytest
import torch
import transformers as t
from torch.utils.data import Dataset
from zoo import IMAGE, SIZES, TOKENS, ZOO, answer, same_bits, tokens

import mixhead
from mixhead import MoHConfig
from mixhead.errors import MixheadError
from mixhead.models.hugging_face import MoHModelMixin
from mixhead.models.hugging_face.trace import RoutingTrace


def both(name):
    """The original, and the converted model with all heads active."""
    return ZOO[name].make(), mixhead.convert(ZOO[name].make(), MoHConfig(active=1.0))


def routed(name, **config):
    return mixhead.convert(ZOO[name].make(), MoHConfig(**{"active": 0.5, "shared": 0.25, **config}))


class Windows(Dataset):
    """Eight windows of tokens, each its own label; the first two tokens are no targets."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = tokens(8)[index]
        return {"input_ids": ids, "labels": torch.where(torch.arange(TOKENS) < 2, -100, ids)}


def trainer(model, folder, **settings):
    arguments = t.TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=0.01, logging_steps=1,
        per_device_train_batch_size=2, save_strategy="no", **settings,
    )  # fmt: skip
    return t.Trainer(model=model, args=arguments, train_dataset=Windows())


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_models_and_configurations_are_pickled(tmp_path):
    joblib = pytest.importorskip("joblib")
    for name in ("llama", "whisper", "clip"):
        model = routed(name)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        joblib.dump(model, tmp_path / "model")
        for again in (
            torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model)), joblib.load(tmp_path / "model")
        ):  # fmt: skip
            assert type(again) is type(model)
            assert again.config == model.config
            assert same_bits(answer(ZOO[name], again), answer(ZOO[name], model))
            assert type(mixhead.revert(again)) is type(ZOO[name].make())
        assert copy.deepcopy(model.config) == pickle.loads(pickle.dumps(model.config)) == model.config
        assert type(copy.deepcopy(model.config)) is type(model.config)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_label_smoothing_of_the_trainer_gives_the_losses_of_the_original(name, steps, tmp_path):
    logs = []
    for model in both(name):
        training = trainer(model, tmp_path, label_smoothing_factor=0.1, max_steps=2, gradient_accumulation_steps=steps)
        training.train()
        logs.append([entry["loss"] for entry in training.state.log_history if "loss" in entry])
    assert logs[0] == logs[1] and len(logs[0]) == 2


def test_label_smoothing_keeps_the_balance_loss(tmp_path):
    """Two micro-batches of a step: the gradient is that of the smoothed loss and of the balance loss, shared out."""
    coefficient = 2.0
    model = routed("llama", balance_coefficient=coefficient).train()
    smoothing = trainer(model, tmp_path, label_smoothing_factor=0.1)
    batch = {key: torch.stack([Windows()[i][key] for i in range(2)]) for key in ("input_ids", "labels")}
    targets, of_the_step = 2 * (TOKENS - 2), 20
    smoothing.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(of_the_step)).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}

    alone = copy.deepcopy(model)
    alone.zero_grad()
    trace = RoutingTrace()
    outputs = alone(input_ids=batch["input_ids"], routing_trace=trace)
    smoothed = smoothing.label_smoother(
        outputs, batch["labels"], shift_labels=True, num_items_in_batch=torch.tensor(of_the_step)
    )
    (smoothed + coefficient * targets / of_the_step * trace.balance_loss()).backward()
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert any(found[name].any() for name in found if "moh_router" in name)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_a_loss_of_ones_own_trains_the_routers_to_balance(as_tuple):
    model = routed("llama", balance_coefficient=0.5).train()
    outputs = model(input_ids=tokens(), return_dict=not as_tuple)
    (outputs[0].sum() * 0.0).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if "moh_router" in n}
    model.zero_grad()
    trace = RoutingTrace()
    model(input_ids=tokens(), routing_trace=trace)
    (0.5 * trace.balance_loss()).backward()
    assert found
    for name, parameter in model.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize("active", [0.5, 1.0])
@pytest.mark.parametrize("name", ["llama", "gpt2"])  # (Of renamed weights the Trainer loses some in dense models too.)
def test_the_trainer_resumes(name, active, tmp_path):
    def training(folder, model, **more):
        made = trainer(model, folder, max_steps=4, **more)
        made.args.save_strategy, made.args.save_steps = t.trainer_utils.SaveStrategy.STEPS, 2
        return made

    def model():
        return mixhead.convert(ZOO[name].make(), MoHConfig(active=active))

    whole = training(tmp_path / "a", model())
    whole.train()
    resumed = training(tmp_path / "a", model())
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    expected = weights_of(whole.model)
    for key, weight in weights_of(resumed.model).items():
        torch.testing.assert_close(weight, expected[key])
    loaded = ZOO[name].auto_class.from_pretrained(tmp_path / "a" / "checkpoint-4")
    assert isinstance(loaded, MoHModelMixin)
    assert same_bits(answer(ZOO[name], loaded), answer(ZOO[name], whole.model.eval()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "qwen2"])
@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config"])
def test_peft_finds_its_default_targets(name, kind):
    peft = pytest.importorskip("peft")
    adapted = [peft.get_peft_model(model, getattr(peft, kind)()) for model in both(name)]
    names = [{n for n, p in model.named_parameters() if p.requires_grad} for model in adapted]
    assert names[0] == names[1] != set()


def test_peft_saves_what_it_tuned_beside_a_model_that_came_from_a_folder(tmp_path):
    peft = pytest.importorskip("peft")
    ZOO["llama"].make().save_pretrained(tmp_path / "original")
    for config in (
        peft.LoraConfig(target_modules="all-linear"),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        model = mixhead.convert(t.AutoModelForCausalLM.from_pretrained(tmp_path / "original"), MoHConfig(active=0.5))
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "tuned")  # asks for the original's vocabulary
        assert (tmp_path / "tuned" / "adapter_model.safetensors").exists()


def test_the_class_of_a_converted_model_loads_no_original(tmp_path):
    ZOO["llama"].make().save_pretrained(tmp_path)
    with pytest.raises(MixheadError, match="does not say which heads"):
        type(routed("llama")).from_pretrained(tmp_path)


def test_whisper_transcribes_in_a_pipeline_and_takes_a_prompt():
    features = t.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    animal, found = ZOO["whisper"], []
    for model in both("whisper"):
        kind = t.AutomaticSpeechRecognitionPipeline(model=model, feature_extractor=features, tokenizer=None).type
        model.generation_config.update(pad_token_id=0, eos_token_id=2, decoder_start_token_id=1, prev_sot_token_id=5)
        written = model.generate(
            animal.inputs()["input_features"][:1], prompt_ids=torch.tensor([5, 7, 8]), max_new_tokens=4,
            do_sample=False, return_dict_in_generate=True,
        )  # fmt: skip
        found.append((kind, written["sequences"].tolist() if isinstance(written, dict) else written.tolist()))
    assert found[0] == found[1]
    assert found[0][0] == "seq2seq_whisper"


def test_lm_eval_knows_an_encoder_decoder():
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    model = t.BartForConditionalGeneration(t.BartConfig(vocab_size=64, d_model=32, **sizes))
    mixhead.convert(model, MoHConfig(active=1.0))
    harness = huggingface.HFLM.__new__(huggingface.HFLM)
    harness._get_backend(model.config, backend="default")
    assert harness.backend == "seq2seq"


@pytest.mark.parametrize("make", [lambda name: both(name)[1], routed], ids=["all heads", "routed"])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_torch_jit_trace(name, make):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make(name)
            self.model.config.use_cache = False

        def forward(self, ids):
            return self.model(ids).logits

    module = Logits().eval()
    with torch.no_grad():
        traced = torch.jit.trace(module, (tokens(),), strict=False)
    other = tokens().flip(0, 1)
    torch.testing.assert_close(traced(other), module(other), rtol=1e-4, atol=1e-5)


def tiny_llava():
    text, image = {**SIZES, "num_hidden_layers": 1}, {**IMAGE, "intermediate_size": 48, "projection_dim": 16}
    config = t.LlavaConfig(
        text_config=t.LlamaConfig(**text), vision_config=t.CLIPVisionConfig(**image), image_token_index=3
    )
    return t.LlavaForConditionalGeneration(config).eval()


def test_a_part_that_was_converted_alone_is_not_saved_inside_a_whole_that_was_not(tmp_path):
    whole = tiny_llava()
    part = mixhead.convert(whole.model.language_model, MoHConfig(active=0.5))
    with pytest.raises(mixhead.MixheadError, match="LlavaForConditionalGeneration cannot be saved: a part of it"):
        whole.save_pretrained(tmp_path / "whole")
    assert whole.state_dict().keys() > {"model.language_model.norm.weight"}
    part.save_pretrained(tmp_path / "part")
    loaded = mixhead.load(tmp_path / "part")
    ids = tokens()
    assert same_bits(loaded(ids).last_hidden_state, part(ids).last_hidden_state)
    mixhead.revert(part)
    whole.save_pretrained(tmp_path / "reverted")
    assert not isinstance(mixhead.load(tmp_path / "reverted"), MoHModelMixin)


def test_a_whole_that_was_converted_is_saved_with_its_parts(tmp_path):
    whole = mixhead.convert(tiny_llava(), MoHConfig(active=0.5))
    whole.save_pretrained(tmp_path)
    loaded = mixhead.load(tmp_path)
    assert same_bits(loaded(input_ids=tokens().clamp(min=4)).logits, whole(input_ids=tokens().clamp(min=4)).logits)
