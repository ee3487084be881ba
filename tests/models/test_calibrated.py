"""A model that was converted, and neither calibrated nor trained, says so wherever it goes, and once."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mixhead
from mixhead import store
from mixhead.models.moh_dit import MoHDiT, MoHDiTConfig, MoHDiTTransformer2DModel, load_dit

IDS = torch.arange(3, 35).view(2, 16)
SENTENCE = "was converted and never calibrated nor trained: its {} routers choose heads at random"


def converted(router="linear", active=0.5):
    torch.manual_seed(0)
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).eval()
    return mixhead.convert(model, mixhead.MoHConfig(active=active, router=router))


@pytest.fixture
def said(caplog):
    """How often it was said since this was called before."""

    def count(router="linear"):
        found = caplog.text.count(SENTENCE.format(router))
        caplog.clear()
        return found

    return count


@pytest.mark.parametrize("router", ["linear", "two_stage"])
@torch.no_grad()
def test_it_is_said_when_it_runs_is_saved_or_loaded(router, said, tmp_path):
    model = converted(router)
    assert model.config.moh["calibrated"] is False
    assert said(router) == 0
    model(input_ids=IDS)
    assert said(router) == 1
    model(input_ids=IDS)
    model.train()(input_ids=IDS)
    assert said(router) == 0  # once
    store.save(converted(router), None, tmp_path / "model")
    assert said(router) == 1
    for load in (store.load, AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path / "model")
        assert loaded.config.moh["calibrated"] is False
        loaded.generate(IDS, max_new_tokens=2, do_sample=False)
        assert said(router) == 1
    mixhead.revert(loaded)(input_ids=IDS)
    assert said(router) == 0


@pytest.mark.parametrize(("router", "active"), [("query_norm", 0.5), ("linear", 1.0)])
@torch.no_grad()
def test_what_has_nothing_to_learn_is_as_it_shall_be(router, active, said, tmp_path):
    model = converted(router, active)
    assert model.config.moh["calibrated"] is True
    model(input_ids=IDS)
    store.save(model, None, tmp_path / "model")
    assert said(router) == 0


def test_a_calibrated_model_has_nothing_to_say(said, tmp_path):
    model = converted()
    mixhead.calibrate(model, [IDS])
    with torch.no_grad():
        model(input_ids=IDS)
    store.save(model, None, tmp_path / "model")
    assert store.load(tmp_path / "model").config.moh["calibrated"] is True
    assert said() == 0


def test_a_calibration_that_fails_leaves_it_as_it_was():
    model = converted()
    model.model.norm.weight.data.fill_(torch.nan)
    model.model.embed_tokens.weight.data.fill_(torch.nan)
    with pytest.raises(mixhead.MixheadError):
        mixhead.calibrate(model, [IDS])
    assert model.config.moh["calibrated"] is False


@pytest.mark.parametrize("frozen", [False, True])
def test_training_fits_routers_too_unless_they_are_frozen(frozen, said):
    model = converted("two_stage").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and "moh_router" in name))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.config.moh["calibrated"] is not frozen
    assert said("two_stage") == frozen


def test_models_saved_before_there_was_a_mark_are_left_alone(said):
    model = converted()
    del model.config.moh["calibrated"]
    model(input_ids=IDS)
    assert said() == 0


def test_a_compiled_model_is_not_stopped_by_it(said):
    model = converted()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("router", ["linear", "two_stage"])
@torch.no_grad()
def test_a_diffusion_transformer_says_it_too(router, said, tmp_path):
    config = MoHDiTConfig(sample_size=8, hidden_size=16, depth=2, num_heads=4, num_classes=3)
    dit = mixhead.convert(MoHDiT(config).eval(), mixhead.MoHConfig(active=0.5, router=router))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 4]), torch.tensor([0, 1])
    dit(x, t, y)
    dit(x, t, y)
    assert said(router) == 1
    MoHDiTTransformer2DModel.from_dit(copy.deepcopy(dit)).save_pretrained(tmp_path / "dit")
    loaded = load_dit(tmp_path / "dit")
    loaded(x, t, y)
    assert said(router) == 1
    if router == "linear":
        mixhead.calibrate(loaded, [{"x": x, "t": t, "y": y}])
        assert loaded.config.calibrated
        MoHDiTTransformer2DModel.from_dit(loaded).save_pretrained(tmp_path / "calibrated")
        load_dit(tmp_path / "calibrated")(x, t, y)
    else:
        with torch.enable_grad():
            loaded.train()(x, t, y)
        loaded.eval()(x, t, y)
    assert said(router) == 0
