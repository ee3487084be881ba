"""Below all heads a converted model computes exactly the selected ones: forward, backward, compiled, checkpointed."""

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from zoo import GQA, ZOO, answer, tokens

import mixhead
from mixhead import MoHConfig
from mixhead.models.hugging_face import find_sites
from mixhead.recording import ExactLog

ROUTERS = ["linear", "query_norm", "two_stage"]


def converted(name, seed=0, layers=2, **config):
    """A converted model of the zoo, every number of its routers random."""
    model = mixhead.convert(ZOO[name].make(layers), MoHConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        if "moh_" in parameter_name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def dense_times_gates(name: str, log: ExactLog, skipped: dict[str, Tensor]) -> Tensor:
    """The slow oracle: the stock model, every head computed from the formula and multiplied by its logged gate."""
    gates = {layer: routing.gates_BNH for layer, routing in log.layers}
    selected = {layer: routing.selected_BNH for layer, routing in log.layers}
    model = ZOO[name].make()
    names = {id(module): layer for layer, module in model.named_modules()}

    def attend(module, query, key, value, mask, scaling=None, is_causal=None, **_):
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).mT * scaling
        causal = module.is_causal if is_causal is None else is_causal
        if mask is None and causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        heads = scores.softmax(-1).nan_to_num() @ value.repeat_interleave(groups, 1)
        layer = names[id(module)]
        out = heads.transpose(1, 2) * gates[layer].unsqueeze(-1)
        return out + ~selected[layer].unsqueeze(-1) * skipped.get(layer, torch.zeros(())), None

    AttentionInterface.register("oracle", attend)
    AttentionMaskInterface.register("oracle", sdpa_mask)
    model.config._attn_implementation = "oracle"
    return answer(ZOO[name], model)


@pytest.mark.parametrize(("router", "active"), [("linear", 0.75), ("query_norm", 0.75), ("two_stage", 0.5)])
@pytest.mark.parametrize("name", ZOO)
def test_the_output_is_that_of_all_heads_times_their_gates(name, router, active):
    model = converted(name, active=active, shared=0.25, router=router)
    with mixhead.keep_routing(model) as log:
        output = answer(ZOO[name], model)
    sites = {site.name: site for site in find_sites(model)}
    assert sorted(layer for layer, _ in log.layers) == sorted(sites)
    for layer, routing in log.layers:
        assert (routing.selected_BNH.sum(-1) == active * sites[layer].num_heads).all()
        assert (routing.gates_BNH[~routing.selected_BNH] == 0).all()
    skipped = {layer: site.module.moh_skipped.detach() for layer, site in sites.items() if router == "linear"}
    torch.testing.assert_close(output, dense_times_gates(name, log, skipped), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output, answer(ZOO[name], ZOO[name].make()), atol=1e-3)


@pytest.mark.parametrize("router", ["linear", "query_norm"])
@pytest.mark.parametrize("name", GQA)
def test_group_balanced_routing_uses_equally_many_heads_of_every_key_value_head(name, router):
    model = converted(name, active=0.5, shared=0.0, router=router, group_balanced=True)
    with mixhead.keep_routing(model) as log:
        answer(ZOO[name], model)
    for _, routing in log.layers:
        heads_per_group = routing.selected_BNH.unflatten(-1, (2, 2)).sum(-1)
        assert (heads_per_group == 1).all()


def test_each_layer_may_have_its_own_number_of_heads_and_some_stay_dense():
    model = converted("whisper", active_heads=[4, 2, 3, 4, 1], shared_heads=[0, 1, 2, 4, 1])
    with mixhead.keep_routing(model) as log:
        answer(ZOO["whisper"], model)
    heads_used = {layer: int(routing.selected_BNH[0, 0].sum()) for layer, routing in log.layers}
    # The layers that use all four heads have no router, so there is nothing to record of them.
    assert list(heads_used.values()) == [2, 3, 1]
    assert "model.encoder.layers.0.self_attn" not in heads_used


def test_layers_with_different_numbers_of_heads_take_the_same_share():
    model = converted("clip", active=0.75, shared=0.25)
    heads = [(layer["num_heads"], layer["active_heads"], layer["shared_heads"]) for layer in model.config.moh["layers"]]
    assert heads == [(4, 3, 1), (4, 3, 1), (8, 6, 2), (8, 6, 2)]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", ZOO)
def test_gradients_reach_routers_and_projections(name, router):
    model = converted(name, active=0.5, shared=0.25, router=router).train()
    model(**ZOO[name].inputs(), **ZOO[name].labels()).loss.backward()
    attention = {id(p) for site in find_sites(model) for p in site.module.parameters()}
    attention |= {id(site.output_projection.weight) for site in find_sites(model)}
    checked = 0
    for parameter_name, parameter in model.named_parameters():
        if id(parameter) in attention and "k_proj.bias" not in parameter_name and "key.bias" not in parameter_name:
            # (A bias of the keys moves all scores of a query alike, so its gradient is 0 in theory.)
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
            assert parameter.grad.any(), parameter_name
            checked += 1
    assert checked >= len(find_sites(model)) * (2 if router == "query_norm" else 3)


@pytest.mark.parametrize("name", ZOO)
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(name):
    def loss_and_gradients(checkpointing):
        model = converted(name, active=0.5, shared=0.25).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        loss = model(**ZOO[name].inputs(), **ZOO[name].labels()).loss
        loss.backward()
        return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    loss, gradients = loss_and_gradients(checkpointing=False)
    checkpointed_loss, checkpointed_gradients = loss_and_gradients(checkpointing=True)
    torch.testing.assert_close(checkpointed_loss, loss)
    assert checkpointed_gradients.keys() == gradients.keys()
    for parameter_name in gradients:
        torch.testing.assert_close(checkpointed_gradients[parameter_name], gradients[parameter_name])


@pytest.mark.parametrize("name", ZOO)
def test_torch_compile_takes_the_whole_model_as_one_graph(name):
    torch._dynamo.reset()
    model = converted(name, layers=1, active=0.5, shared=0.25)
    expected = answer(ZOO[name], model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(answer(ZOO[name], compiled), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ["linear", "two_stage"])
def test_torch_compile_trains(router):
    torch._dynamo.reset()
    animal = ZOO["llama"]
    model = converted("llama", layers=1, active=0.5, shared=0.25, router=router).train()
    expected = model(**animal.inputs(), **animal.labels()).loss
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(**animal.inputs(), **animal.labels()).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[parameter_name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_torch_compile_with_the_inductor():
    torch._dynamo.reset()
    model = converted("llama", layers=1, active=0.5, shared=0.25)
    expected = answer(ZOO["llama"], model)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(answer(ZOO["llama"], compiled), expected, rtol=1e-4, atol=1e-4)


def test_attention_dropout_works_in_training_and_is_off_in_evaluation():
    model = converted("llama", active=0.5, shared=0.25)
    for site in find_sites(model):
        site.module.attention_dropout = 0.5
    expected = answer(ZOO["llama"], model)
    torch.testing.assert_close(answer(ZOO["llama"], model), expected)
    model.train()
    with mixhead.keep_routing(model) as log:
        torch.manual_seed(0)
        first = answer(ZOO["llama"], model)
        torch.manual_seed(0)
        again = answer(ZOO["llama"], model)
        other = answer(ZOO["llama"], model)
    torch.testing.assert_close(again, first)
    assert not torch.allclose(other, first)
    # Dropout changes what a head computes, never how many a token uses.
    assert all((routing.selected_BNH.sum(-1) == 2).all() for _, routing in log.layers)


def test_dropout_keeps_the_mean_of_the_output():
    model = converted("llama", layers=1, active=0.5, shared=0.25)
    attention = model.model.layers[0].self_attn
    attention.attention_dropout = 0.3
    outputs = []
    attention.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0].detach()))
    inputs = tokens(1)
    model.model(inputs)
    attention.train()
    model.model(inputs.expand(1000, -1))
    expected, dropped = outputs
    torch.testing.assert_close(dropped.mean(0, keepdim=True), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["llama", "bert", "whisper"])
def test_attention_weights_are_refused_since_skipped_heads_have_none(name):
    model = converted(name, active=0.5, shared=0.25)
    with pytest.raises(mixhead.MixheadError, match="no attention weights to return"):
        model(**ZOO[name].inputs(), output_attentions=True)


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_a_model_that_ran_eager_attention_routes_to_the_same_result(name):
    expected = answer(ZOO[name], converted(name, active=0.5, shared=0.25))
    model = ZOO[name].make()
    model.set_attn_implementation("eager")
    mixhead.convert(model, MoHConfig(active=0.5, shared=0.25))
    model.load_state_dict(converted(name, active=0.5, shared=0.25).state_dict())
    torch.testing.assert_close(answer(ZOO[name], model), expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_routes_like_float32_where_the_choice_is_clear():
    model = converted("llama", active=0.5, shared=0.25)
    with mixhead.keep_routing(model) as exact:
        answer(ZOO["llama"], model)
    with mixhead.keep_routing(model.bfloat16()) as rounded:
        output = answer(ZOO["llama"], model)
    assert output.dtype == torch.bfloat16
    agreement = [
        (a.selected_BNH == b.selected_BNH).float().mean()
        for (_, a), (_, b) in zip(exact.layers, rounded.layers, strict=True)
    ]
    assert min(agreement) > 0.9
