"""Recordings: what a model's routers decide, what its modules say of the tokens, and the file that keeps both."""

import errno
import gc
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import mixhead
from mixhead import MixheadError, MixtureOfHeadAttention, Recording, keep_routing, record_routing
from mixhead.recording import Call, RecordingWriter
from mixhead.recording.file import decode, encode
from mixhead.routing import Routing


class Denoiser(nn.Module):
    """Two layers, and the labels of a diffusion model."""

    def __init__(self, router="two_stage"):
        super().__init__()
        self.layers = nn.ModuleList(MixtureOfHeadAttention(8, 4, 1, 2, router=router) for _ in range(2))

    def routing_labels(self, x, t):
        return {"time_step": t, "noise": t / 10}

    def forward(self, x, t):
        for layer in self.layers:
            x = x + layer(x)
        return x


class Encoder(nn.Module):
    """A language model's signature, over routers that know padding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layer = MixtureOfHeadAttention(8, 4, 1, 2)

    def forward(self, input_ids, attention_mask=None):
        return self.layer(self.embed(input_ids), token_mask_BN=attention_mask)


def test_layers_and_labels_of_every_call(tmp_path):
    model = Denoiser()
    with record_routing(model, tmp_path / "run"), keep_routing(model) as exact:
        for step in (9, 4):
            model(torch.randn(2, 3, 8), torch.tensor([step, step]))
    recording = Recording(tmp_path / "run")
    assert recording.layers == ("layers.0", "layers.1")
    tokens = recording.tokens("layers.1")
    assert tokens.labels["time_step"].tolist() == [9] * 6 + [4] * 6
    assert tokens.labels["noise"].tolist() == pytest.approx([0.9] * 6 + [0.4] * 6)
    assert tokens.row.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert tokens.position.tolist() == [0, 1, 2] * 4
    assert tokens.sequence.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert recording.shared == {"layers.0": [0], "layers.1": [0]}
    exact_BNH = exact.layers[1][1].selected_BNH
    assert np.array_equal(recording.selected("layers.1")[:6], exact_BNH.reshape(6, 4).numpy())


def test_gates_are_right_to_half_a_step_of_their_range(tmp_path):
    model = Denoiser()
    with record_routing(model, tmp_path / "run"), keep_routing(model) as exact:
        model(torch.randn(2, 50, 8), torch.tensor([1, 2]))
    exact_TH = exact.layers[0][1].gates_BNH.flatten(0, 1).numpy()
    gates_TH = Recording(tmp_path / "run").gates("layers.0")
    chosen = exact_TH[exact_TH > 0]
    assert np.abs(gates_TH - exact_TH).max() <= (chosen.max() - chosen.min()) / 254 / 2 * 1.001


def test_a_selected_head_with_the_gate_0_stays_selected():
    selected_TH = torch.tensor([[True, False, True]])
    codes_TH, limits = encode(torch.tensor([[0.0, 0.0, 2.0]]), selected_TH)
    assert codes_TH.tolist() == [[1, 0, 255]]
    assert decode(codes_TH, limits[None]).tolist() == [[0.0, 0.0, 2.0]]


def test_a_recording_without_a_name_is_kept_by_saving_it(tmp_path):
    model, x = Denoiser("linear"), torch.randn(2, 3, 8)
    with record_routing(model) as log, record_routing(model, tmp_path / "named") as named, keep_routing(model) as exact:
        for step in range(3):
            model(x, torch.tensor([step, step]))
            log.save(tmp_path / "sofar")
    log.save(tmp_path / "saved")
    for suffix in (".safetensors", ".json"):
        assert (tmp_path / f"saved{suffix}").read_bytes() == (tmp_path / f"named{suffix}").read_bytes()
    assert Recording(tmp_path / "saved").num_tokens("layers.0") == 18
    for made in (log, named):
        assert all(torch.equal(made.load()[name], load_H) for name, load_H in exact.load().items())
    with pytest.raises(MixheadError, match="complete and lies in its files"):
        named.save(tmp_path / "again")
    assert {path.stem for path in tmp_path.iterdir()} == {"saved", "sofar", "named"}


def test_a_temporary_recording_goes_with_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with record_routing(Denoiser()) as log:
        assert len([*tmp_path.iterdir()]) == 1
    log.save(tmp_path / "run")
    del log
    gc.collect()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.safetensors"]


def test_padding_is_not_recorded_and_positions_count_real_tokens(tmp_path):
    model = Encoder()
    mask = torch.tensor([[True, True, True], [False, True, True]])
    with record_routing(model, tmp_path / "run"):
        model(torch.tensor([[5, 6, 7], [0, 8, 9]]), attention_mask=mask)
    tokens = Recording(tmp_path / "run").tokens("layer")
    assert tokens.labels["token"].tolist() == [5, 6, 7, 8, 9]
    assert tokens.position.tolist() == [0, 1, 2, 0, 1]


def test_labels_of_ones_own(tmp_path):
    model = Denoiser()
    with record_routing(model) as log:
        for name in ("prose", "code", "prose"):
            with log.labelled(task=name, run=7):
                model(torch.randn(1, 2, 8), torch.tensor([0]))
        model(torch.randn(1, 2, 8), torch.tensor([0]))
    log.about["model"] = "tiny"
    log.save(tmp_path / "run")
    recording = Recording(tmp_path / "run.json")
    labels = recording.tokens("layers.0").labels
    assert labels["task"].tolist() == [0, 0, 1, 1, 0, 0, -1, -1]
    assert labels["run"].tolist() == [7] * 6 + [-1] * 2
    assert recording.names == {"task": {0: "prose", 1: "code"}}
    assert recording.about == {"model": "tiny"}


def test_layers_that_saw_the_same_tokens_share_their_description(tmp_path):
    model = Denoiser()
    with record_routing(model, tmp_path / "run"):
        model(torch.randn(2, 3, 8), torch.tensor([1, 2]))
        model.layers[1](torch.randn(1, 5, 8))
    recording = Recording(tmp_path / "run")
    assert len(load_file(tmp_path / "run.safetensors")["token/row"]) == 11
    assert recording.same_tokens("layers.0") == ["layers.0"]
    assert recording.num_tokens("layers.1") == 11
    assert recording.tokens("layers.1").labels["time_step"].tolist() == [1, 1, 1, 2, 2, 2] + [-1] * 5


def test_memory_does_not_grow_with_the_tokens(tmp_path):
    import tracemalloc

    writer = RecordingWriter(tmp_path)
    selected_BNH = torch.rand(4, 250, 8) < 0.5
    routing = Routing(torch.rand(4, 250, 8) * selected_BNH, selected_BNH)
    peaks = []
    for part in range(2):
        tracemalloc.start()
        for call in range(100):
            writer.add("layer", routing, Call(100 * part + call, labels={"class": torch.tensor([1, 2, 3, 4])}))
        peaks.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    writer.save(tmp_path / "run")
    assert peaks[1] < 100_000  # 800,000 bytes of gates were written meanwhile
    assert Recording(tmp_path / "run").num_tokens("layer") == 200_000
    assert (tmp_path / "run.safetensors").stat().st_size < 200_000 * (8 + 5 * 4) * 1.01


def test_an_error_leaves_no_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), record_routing(Denoiser(), tmp_path / "run"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_recording_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(MixheadError, match="There is no recording"):
        Recording(tmp_path / "none")
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(MixheadError, match="damaged"):
        Recording(tmp_path / "bad")
    (tmp_path / "bad.json").write_text(json.dumps({"format": "mixhead routing 9"}))
    with pytest.raises(MixheadError, match="routing 9"):
        Recording(tmp_path / "bad")
    with pytest.raises(MixheadError, match="does not exist"), record_routing(Denoiser(), tmp_path / "no" / "run"):
        pass


def test_parts_that_do_not_fit_together_are_refused_in_a_sentence(tmp_path):
    model = Denoiser()
    with record_routing(model, tmp_path / "run"):
        model(torch.randn(1, 2, 8), torch.tensor([0]))
    whole = load_file(tmp_path / "run.safetensors")
    for change in ({"chunks/layers.0": np.array([7], np.int32)}, {"gates/layers.1": np.zeros((9, 4), np.uint8)}):
        save_file({**whole, **change}, tmp_path / "run.safetensors")
        with pytest.raises(MixheadError, match="damaged or none of mixhead's"):
            Recording(tmp_path / "run")
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(MixheadError, match="damaged or none of mixhead's"):
        Recording(tmp_path / "run")


def test_a_folder_that_cannot_be_written_to_is_refused_in_a_sentence(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    routing = Routing(torch.ones(1, 2, 4), torch.ones(1, 2, 4, dtype=torch.bool))
    writer = RecordingWriter(tmp_path)
    writer.add("layer", routing, Call())
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(MixheadError, match="cannot be written: Read-only file system"):
        writer.save(tmp_path / "run")
    with pytest.raises(MixheadError, match=r"Nothing can be recorded in .*Read-only file system"):
        RecordingWriter(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(MixheadError, match="cannot be written to"), record_routing(Denoiser(), tmp_path / "run"):
        pass


def test_a_model_that_routes_nowhere_gives_an_empty_recording(tmp_path):
    with record_routing(nn.Linear(2, 2), tmp_path / "run"):
        pass
    assert Recording(tmp_path / "run").layers == ()


def test_a_moh_vit_says_where_its_tokens_stand(tmp_path):
    from mixhead.models.moh_vit import MoHTransNeXtConfig, MoHTransNeXtForImageClassification

    config = MoHTransNeXtConfig(
        hidden_sizes=(8, 16), num_heads=(2, 4), depths=(1, 1), mlp_ratios=(2, 2), pool_ratios=(2, 1),
        shared_heads=(1, 1), top_k=(1, 2), image_size=32, num_labels=3,
    )  # fmt: skip
    model = MoHTransNeXtForImageClassification(config).eval()
    with record_routing(model, tmp_path / "run") as log, log.labelled(**{"class": "boat"}), torch.no_grad():
        model(torch.randn(2, 3, 32, 48))
    recording = Recording(tmp_path / "run")
    assert recording.layers == ("stages.0.blocks.0.attention", "stages.1.blocks.0.attention")
    tokens = recording.tokens(recording.layers[1])
    assert len(tokens) == 2 * 4 * 6
    assert tokens.labels["y"].tolist() == [row for row in range(4) for _ in range(6)] * 2
    assert tokens.labels["x"].tolist() == [*range(6)] * 8
    assert recording.names["class"][int(tokens.labels["class"][0])] == "boat"


def test_generation_continues_its_sequences(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    model = mixhead.convert(LlamaForCausalLM(sizes).eval(), mixhead.MoHConfig(active=0.5, shared=0.25))
    ids = torch.tensor([[1, 2, 3], [0, 4, 5]])
    with record_routing(model, tmp_path / "run"):
        for _ in range(2):
            out = model.generate(ids, attention_mask=ids != 0, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    recording = Recording(tmp_path / "run")
    tokens = recording.tokens(recording.layers[0])
    for sequence in range(4):
        mine = tokens.sequence == sequence
        written = out[sequence % 2, :-1]  # the last token is never read
        assert tokens.labels["token"][mine].tolist() == written[written != 0].tolist()
