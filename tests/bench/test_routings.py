"""Which heads a benchmark's tokens use."""

import pytest
import torch

from mixhead.bench.routings import GivenRouting, load_recording, make_routing, save_recording
from mixhead.errors import MixheadError
from mixhead.recording import ExactLog
from mixhead.routing import LinearRouter, Routing


def log_of(*layers):
    log = ExactLog()
    for name, routing in layers:
        log.record(name, routing)
    return log


@pytest.mark.parametrize(("share", "heads"), [(1.0, 8), (0.5, 4), (0.3, 2), (0.01, 1)])
def test_random_routing_gives_every_token_as_many_heads(share, heads):
    routing = make_routing("random", 2, 63, 8, share)
    assert (routing.selected_BNH.sum(-1) == heads).all()
    assert torch.equal(routing.gates_BNH != 0, routing.selected_BNH)


def test_skewed_routing_has_a_busy_head_an_idle_one_and_the_share_asked_for():
    load_H = make_routing("skewed", 1, 20_000, 16, 0.5).selected_BNH.float().mean((0, 1))
    assert load_H[0] == pytest.approx(0.9, abs=0.02)
    assert load_H[1] == pytest.approx(0.1, abs=0.02)
    assert load_H.mean() == pytest.approx(0.5, abs=0.01)


def test_a_recorded_prompt_comes_back_and_is_repeated_or_cut(tmp_path):
    early, late = make_routing("random", 1, 5, 4, 0.5), make_routing("random", 1, 5, 4, 0.75)
    file = tmp_path / "routing.safetensors"
    save_recording(log_of(("model.layers.2.attn", early), ("model.layers.10.attn", late)), file)
    assert list(load_recording(file)) == ["model.layers.2.attn", "model.layers.10.attn"]
    routing = make_routing(str(file), 3, 7, 4, 0.5)
    for row, layer in enumerate((early, late, early)):
        assert torch.equal(routing.selected_BNH[row, :5], layer.selected_BNH[0])
        assert torch.equal(routing.gates_BNH[row, 5:], layer.gates_BNH[0, :2])


def test_what_is_no_recording_is_refused_in_a_sentence(tmp_path):
    file = tmp_path / "routing.safetensors"
    with pytest.raises(MixheadError, match="there is no file"):
        make_routing(str(file), 1, 4, 4, 0.5)
    file.write_bytes(b"nonsense")
    with pytest.raises(MixheadError, match="no recorded routing"):
        make_routing(str(file), 1, 4, 4, 0.5)
    save_recording(log_of(("a", make_routing("random", 1, 5, 4, 0.5))), file)
    with pytest.raises(MixheadError, match="records 4 heads, but 9"):
        make_routing(str(file), 1, 4, 9, 0.5)
    with pytest.raises(MixheadError, match="Nothing was recorded"):
        save_recording(log_of(), file)


def test_a_given_routing_replaces_the_choice_and_keeps_the_balance_loss():
    router, hidden_BNC = LinearRouter(12, 6, 0, 3), torch.randn(2, 9, 12)
    given = make_routing("random", 2, 9, 6, 0.5)
    routing = GivenRouting(router, given)(hidden_BNC)
    assert torch.equal(routing.selected_BNH, given.selected_BNH)
    assert torch.equal(routing.probs_BNH, router(hidden_BNC).probs_BNH)
    last = GivenRouting(router, Routing(given.gates_BNH, given.selected_BNH))(hidden_BNC[:, -2:])
    assert torch.equal(last.gates_BNH, given.gates_BNH[:, -2:])
