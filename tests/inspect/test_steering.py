"""Another choice of heads while a model runs."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mixhead
from mixhead import MixheadError
from mixhead.inspect.steering import Steering, steered

IDS = torch.tensor([[1, 2, 3, 4, 5]])
LAYERS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def make(router="linear", seed=0):
    torch.manual_seed(seed)
    sizes = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4)
    dense = LlamaForCausalLM(sizes).eval()
    return mixhead.convert(dense, mixhead.MoHConfig(active=0.5, shared=0.25, router=router))


@torch.no_grad()
def routings(model):
    with mixhead.keep_routing(model) as log:
        model(IDS)
    return dict(log.layers)


def test_with_all_heads_it_is_the_dense_model():
    model = make()
    with torch.no_grad(), steered(model, Steering(active_heads=4)):
        logits = model(IDS).logits
    with torch.no_grad():
        torch.testing.assert_close(logits, mixhead.revert(model)(IDS).logits)


@pytest.mark.parametrize("router", ["linear", "two_stage", "query_norm"])
def test_heads_switched_off_are_used_by_no_token_and_others_take_their_place(router):
    model = make(router)
    own = routings(model)
    with steered(model, Steering(off={LAYERS[0]: [0, 2]})):  # head 0 is shared
        changed = routings(model)
    selected_BNH = changed[LAYERS[0]].selected_BNH
    assert not selected_BNH[..., [0, 2]].any()
    assert (selected_BNH.sum(-1) == 2).all()
    assert torch.equal(changed[LAYERS[0]].gates_BNH != 0, selected_BNH)
    assert (own[LAYERS[1]].selected_BNH.sum(-1) == changed[LAYERS[1]].selected_BNH.sum(-1)).all()


def test_more_and_fewer_heads_keep_the_order_of_the_router():
    model = make()
    choices = {}
    for active in (1, 2, 3):
        with steered(model, Steering(active_heads=active)):
            choices[active] = routings(model)[LAYERS[0]].selected_BNH
    assert (choices[1] <= choices[2]).all()
    assert (choices[2] <= choices[3]).all()
    assert torch.equal(choices[2], routings(model)[LAYERS[0]].selected_BNH)
    assert (choices[1].nonzero()[:, -1] == 0).all()  # the shared head stays longest


def test_afterwards_the_model_has_its_own_routers():
    model = make()
    before = [*model.named_modules()]
    with pytest.raises(KeyboardInterrupt), steered(model, Steering(active_heads=1)):
        raise KeyboardInterrupt
    assert [*model.named_modules()] == before


def test_what_cannot_be_is_refused():
    model = make()
    with pytest.raises(MixheadError, match="at least one head"):
        Steering(active_heads=0)
    for off, message in (
        ({"x": [0]}, "No layer 'x'"),
        ({LAYERS[0]: [0, 1, 2, 3]}, "must stay"),
        ({LAYERS[0]: [4]}, "0 to 3"),
    ):
        with pytest.raises(MixheadError, match=message), steered(model, Steering(off=off)):
            pass
