"""The router of MoA: choices, gates, noise, sampling, padding, and the three losses at values known by hand."""

import math

import pytest
import torch

from mixhead.errors import MixheadError
from mixhead.routing import ExpertRouter, LossWeights
from mixhead.routing.experts import NORMALISATIONS

C, E = 12, 5


def make(top_k=2, **kwargs):
    router = ExpertRouter(C, E, top_k, **kwargs)
    torch.nn.init.normal_(router.gate_proj.weight)
    return router


def states(batch=3, tokens=7):
    return torch.randn(batch, tokens, C)


def test_slots_and_heads_tell_the_same():
    routing = make()(states())
    assert routing.selected_BNH.sum(-1).eq(2).all()
    assert routing.slots(1) == 2
    for slot in range(2):
        expert_BN1 = routing.expert_BNS[..., slot, None]
        assert routing.selected_BNH.gather(-1, expert_BN1).all()
        assert routing.gates_BNH.gather(-1, expert_BN1).squeeze(-1).equal(routing.gates_BNS[..., slot])


def test_gates_by_normalisation():
    hidden_BNC = states()
    routings = {}
    for normalisation in NORMALISATIONS:
        torch.manual_seed(0)
        routings[normalisation] = make(normalisation=normalisation)(hidden_BNC)
    soft = routings["softmax"]
    assert soft.gates_BNS.equal(soft.probs_BNH.topk(2).values)
    assert soft.gates_BNS.sum(-1).lt(1).all()
    renormalised = soft.gates_BNS / soft.gates_BNS.sum(-1, keepdim=True)
    torch.testing.assert_close(routings["renormalised"].gates_BNS, renormalised, rtol=1e-4, atol=0)
    torch.testing.assert_close(routings["top_k_softmax"].gates_BNS, renormalised)


def test_the_renormalising_sum_has_no_gradient():
    """So the gradient of the sum of the gates is not 0, as it is where the sum is differentiated."""
    gradients = {}
    for normalisation in ("renormalised", "top_k_softmax"):
        torch.manual_seed(0)
        router = make(normalisation=normalisation)
        router(states()).gates_BNS.sum().backward()
        gradients[normalisation] = router.gate_proj.weight.grad.abs().max()
    assert gradients["renormalised"] > 1e-2
    assert gradients["top_k_softmax"] < 1e-5


def test_an_untrained_router_finds_all_experts_equally_likely():
    routing = ExpertRouter(C, E, 2, loss_weights=LossWeights(switch=1.0, z=1.0, cv=0.0))(states())
    assert routing.probs_BNH.eq(1 / E).all()
    torch.testing.assert_close(routing.z_loss, torch.tensor(math.log(E) ** 2))
    torch.testing.assert_close(routing.switch_loss, torch.tensor(1.0))
    torch.testing.assert_close(routing.aux_loss, routing.switch_loss + routing.z_loss)


def test_losses_of_a_collapse():
    """All tokens on one expert: f and P are 1 there, so the switch loss is E; the variance of one 1 in E is 1 / E."""
    router = make(1, loss_weights=LossWeights(switch=0.0, z=0.0, cv=2.0))
    router.gate_proj.weight.data.zero_()
    router.gate_proj.weight.data[3] = 100.0
    routing = router(torch.ones(2, 4, C))
    assert routing.load_H.tolist() == [0.0, 0.0, 0.0, 1.0, 0.0]
    torch.testing.assert_close(routing.switch_loss, torch.tensor(float(E)))
    torch.testing.assert_close(routing.cv_loss, torch.tensor(float(E)))
    torch.testing.assert_close(routing.aux_loss, 2 * routing.cv_loss)


def test_padding_chooses_nothing_and_moves_neither_balance_loss():
    router, hidden_BNC = make(), states()
    real_BN = torch.rand(3, 7) < 0.6
    hidden_BNC[~real_BN] = 1e4
    routing = router(hidden_BNC, None, real_BN)
    assert routing.selected_BNH.any(-1).equal(real_BN)
    assert routing.filled_BNS.all(-1).equal(real_BN)
    assert not routing.gates_BNS[~real_BN].any()
    assert routing.slots(1) is None  # No promise: padding uses none.
    packed = router(hidden_BNC[real_BN].unsqueeze(0))
    for loss in ("switch_loss", "cv_loss"):
        torch.testing.assert_close(getattr(routing, loss), getattr(packed, loss))


def test_noise_in_training_only():
    router, hidden_BNC = make(noisy=True), states(64, 64)
    router.noise_proj.weight.data.fill_(1.0)
    router.eval()
    clean = router(hidden_BNC).logits_BNE
    assert clean.equal(router(hidden_BNC).logits_BNE)
    router.train()
    noise_BNE = router(hidden_BNC).logits_BNE - clean
    expected_BN1 = torch.nn.functional.softplus(hidden_BNC.sum(-1, keepdim=True)) + 0.01
    assert abs((noise_BNE / expected_BN1).std().item() - 1) < 0.02
    router(hidden_BNC).gates_BNS.sum().backward()
    assert router.noise_proj.weight.grad.abs().sum() > 0


def test_sampling_in_training_only():
    router, hidden_BNC = make(3, sample_k=1), states(40, 50)
    router.eval()
    expected = router(hidden_BNC)
    router.train()
    sampled = router(hidden_BNC)
    assert sampled.expert_BNS[..., :2].equal(expected.expert_BNS[..., :2])
    third_BN = sampled.expert_BNS[..., 2]
    assert (sampled.expert_BNS[..., :2] != third_BN[..., None]).all()
    # An expert is drawn in proportion to its probability among those that are left.
    left_BNE = sampled.probs_BNH.scatter(-1, sampled.expert_BNS[..., :2], 0.0)
    chance_BN = left_BNE.max(-1).values / left_BNE.sum(-1)
    drawn = (third_BN == left_BNE.argmax(-1)).float().mean()
    assert abs(drawn - chance_BN.mean()) < 0.04


def test_scores_are_computed_in_float32():
    router = make().bfloat16()
    routing = router(states().bfloat16())
    assert routing.logits_BNE.dtype == routing.gates_BNS.dtype == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"top_k": 0}, "top_k=0 must be at least 1 and at most num_experts=5"),
        ({"sample_k": 3}, "sample_k=3 must be at least 0 and at most top_k=2"),
        ({"normalisation": "none"}, "normalisation='none' is unknown: choose one of softmax, renormalised"),
    ],
)
def test_impossible_routers_are_refused(kwargs, message):
    with pytest.raises(MixheadError, match=message):
        ExpertRouter(C, E, **{"top_k": 2, **kwargs})


def test_negative_weights_of_losses_are_refused():
    with pytest.raises(MixheadError, match="weight of the z loss must be 0 or a positive number"):
        LossWeights(z=-1.0)
