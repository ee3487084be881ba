"""Short names of layers."""

from mixhead.recording.names import short_names


def test_short_names():
    assert short_names(["model.layers.0.self_attn", "model.layers.11.self_attn"]) == ["0", "11"]
    assert short_names(["encoder.layers.0.attn", "decoder.layers.0.attn", "decoder.layers.1.attn"]) == [
        "encoder.0", "decoder.0", "decoder.1",
    ]  # fmt: skip
    assert short_names(["e.0.attn", "d.0.x.attn"]) == ["e.0", "d.0.x"]
    assert short_names(["model.layers.3.attn"]) == ["3"]
