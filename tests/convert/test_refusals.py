"""What cannot be converted is refused with a sentence that says why, and is left as it was."""

import pytest
import torch
import transformers as t
from zoo import GROUPED, SIZES, VOCABULARY, ZOO, answer, same_bits

import mixhead
from mixhead import MixheadError, MoHConfig


def refuses(match):
    return pytest.raises(MixheadError, match=match)


def test_soft_capped_scores():
    sizes = {**GROUPED, "head_dim": 8}
    model = t.Gemma2ForCausalLM(t.Gemma2Config(**sizes, attn_logit_softcapping=50.0))
    with refuses(r"Gemma2ForCausalLM cannot be converted: it caps its attention scores \(attn_logit_softcapping\)"):
        mixhead.convert(model)


def test_position_biases():
    model = t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    )
    with refuses("T5ForConditionalGeneration cannot be converted: its layers add a position bias"):
        mixhead.convert(model)


def test_architectures_without_the_attention_interface():
    model = t.BloomModel(t.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4))
    with refuses("BloomModel cannot be converted: none of its modules dispatches its attention"):
        mixhead.convert(model)


def test_learned_sinks():
    sizes = {**GROUPED, "num_hidden_layers": 1, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    with refuses("GptOssForCausalLM cannot be converted: its attention has learned sinks"):
        mixhead.convert(t.GptOssForCausalLM(t.GptOssConfig(**sizes)))


def test_a_model_without_attention():
    model = t.MambaForCausalLM(t.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1))
    with refuses("none of its modules dispatches its attention"):
        mixhead.convert(model)


@pytest.fixture
def one_process(tmp_path):
    """What distribution takes, with a single process."""
    dist = pytest.importorskip("torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_weights_that_are_split_among_processes(one_process):
    """New routers would not be split, nor their gradients summed: each process would train its own."""
    from torch.distributed.fsdp import fully_shard

    with refuses(r"weights of this FSDPLlamaForCausalLM are split among processes .* Convert it first, then split it"):
        mixhead.convert(fully_shard(ZOO["llama"].make()))
    model = fully_shard(mixhead.convert(ZOO["llama"].make()))
    with refuses("Calibrate it first, then split it"):
        mixhead.calibrate(model, [torch.zeros(1, 4, dtype=torch.long)])
    answer(ZOO["llama"], model)


def test_weights_that_deepspeed_has_split():
    model = ZOO["llama"].make()
    next(model.parameters()).ds_id = 0
    with refuses("split among processes"):
        mixhead.convert(model)


def test_tensor_parallelism_at_loading(tmp_path, monkeypatch):
    """Two processes would each route among half of the heads as if these were all."""
    from transformers.distributed import DistributedConfig

    mixhead.save(mixhead.convert(ZOO["llama"].make()), None, tmp_path / "model")
    asked = DistributedConfig(tp_plan="auto", tp_size=2)
    monkeypatch.setattr(t.PreTrainedModel, "prepare_distribute_model", lambda *_, **__: (asked, None, None))
    for loader in (t.AutoModelForCausalLM, t.LlamaForCausalLM, type(mixhead.load(tmp_path / "model"))):
        with refuses(r"cannot be split by tensor parallelism \(tp_plan, tp_size\)"):
            loader.from_pretrained(tmp_path / "model", distributed_config=asked)


def test_a_module_that_is_not_of_transformers():
    with refuses("takes a model of transformers or a MoHDiT, but this is a Linear"):
        mixhead.convert(torch.nn.Linear(2, 2))


def test_a_converted_model():
    model = mixhead.convert(ZOO["llama"].make())
    with refuses(r"This LlamaForCausalLM is converted already: call mixhead\.revert"):
        mixhead.convert(model)


def test_reverting_a_model_that_is_not_converted():
    with refuses("LlamaForCausalLM is no converted model, so there is nothing to revert"):
        mixhead.revert(ZOO["llama"].make())


def test_a_model_that_is_set_to_return_attention_weights():
    config = t.LlamaConfig(**GROUPED, output_attentions=True, attn_implementation="eager")
    with refuses("set to return attention weights"):
        mixhead.convert(t.LlamaForCausalLM(config))


def test_a_model_with_one_head():
    sizes = {**SIZES, "num_attention_heads": 1}
    with refuses("Layer 0 has a single head, so there is nothing to choose from"):
        mixhead.convert(t.LlamaForCausalLM(t.LlamaConfig(**sizes)), MoHConfig(active=0.75, shared=0.0))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"active": 0.5, "shared": 0.75}, "shared=0.75 exceeds active=0.5"),
        ({"active_heads": 2, "shared_heads": 3}, "shared_heads=3 exceeds active_heads=2"),
        ({"active": [0.75, 0.25], "shared": 0.5}, "shared=0.5 exceeds active=0.25"),
        ({"active": 0.0}, "active=0.0 is no share of heads"),
        ({"active": 1.5}, "active=1.5 is no share of heads"),
        ({"active": float("nan")}, "active=nan is no share of heads"),
        ({"active": "half"}, "active=half is no share of heads"),
        ({"active": None}, "active must be a number between 0 and 1, or a list of them"),
        ({"active": []}, "active must be a number between 0 and 1, or a list of them"),
        ({"shared": -0.1}, "shared=-0.1 is no share of heads"),
        ({"active_heads": 2.5}, "active_heads=2.5 must be a whole number"),
        ({"active_heads": 0}, "active_heads=0 must be a whole number of at least 1"),
        ({"router": "oracle"}, "router='oracle' is unknown: choose one of two_stage, query_norm, linear"),
        ({"router": "two_stage", "group_balanced": True}, "router='two_stage' cannot be group-balanced"),
        ({"balance_coefficient": -1.0}, "balance_coefficient=-1.0 must be 0 or a positive number"),
        ({"balance_coefficient": float("nan")}, "balance_coefficient=nan must be 0 or a positive number"),
    ],
)
def test_configurations_that_can_never_be(config, match):
    with refuses(match):
        MoHConfig(**config)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"active": 0.05, "shared": 0.0}, "Layer 0 has 4 heads, and active=0.05 gives 0 active heads"),
        ({"active_heads": 5}, "Layer 0 has 4 heads, and active_heads=5 gives 5 active heads"),
        ({"active": 0.5, "shared_heads": 3}, "shared_heads=3 gives 3 shared heads, but only 2 of 4 heads are active"),
        ({"active": [0.5, 0.5, 0.5], "shared": 0.0}, "active has 3 entries, but the model has 2 attention layers"),
        ({"active_heads": [3, 3, 3], "shared_heads": 1}, "active_heads has 3 entries"),
        ({"active_heads": 3, "shared_heads": 0, "group_balanced": True}, "must be multiples of its 2 key-value heads"),
    ],
)
def test_configurations_that_do_not_fit_the_model_leave_it_as_it_was(config, match):
    model = ZOO["llama"].make()
    before, kind = answer(ZOO["llama"], model), type(model)
    with refuses(match):
        mixhead.convert(model, MoHConfig(**config))
    assert type(model) is kind
    assert not hasattr(model.config, "moh")
    assert same_bits(answer(ZOO["llama"], model), before)


def test_every_head_shared_but_not_every_head_active_is_refused_by_the_learned_router():
    with refuses("top_k=0 leaves 2 of 4 heads unused for ever"):
        mixhead.convert(ZOO["llama"].make(), MoHConfig(active=0.5, shared=0.5, router="two_stage"))


def test_a_refusal_in_the_middle_leaves_the_model_as_it_was():
    model = ZOO["llama"].make()
    before, kind = answer(ZOO["llama"], model), type(model)
    with refuses("unused for ever"):
        mixhead.convert(model, MoHConfig(active=[0.75, 0.5], shared=0.5, router="two_stage"))
    assert type(model) is kind
    assert not hasattr(model.config, "moh")
    assert same_bits(answer(ZOO["llama"], model), before)
    mixhead.convert(model, MoHConfig(active=0.5))


def test_reentrant_checkpointing_would_lose_the_gradient_of_the_balance_loss():
    model = mixhead.convert(ZOO["llama"].make(), MoHConfig(balance_coefficient=0.01)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with refuses("[Rr]eentrant gradient checkpointing"):
        model(**ZOO["llama"].inputs(), **ZOO["llama"].labels())
