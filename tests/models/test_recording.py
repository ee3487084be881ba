"""Every model of the library takes part in `record_routing`."""

import pytest
import torch

import mixhead
from mixhead import Recording, stream_routing


def test_moh_dit_over_time_steps_and_classes(tmp_path):
    from mixhead.models.moh_dit import MoHDiT, MoHDiTConfig

    sizes = {"sample_size": 8, "in_channels": 4, "hidden_size": 24, "depth": 2, "num_heads": 4, "head_dim": 6}
    dit = MoHDiT(MoHDiTConfig(**sizes, shared_heads=(1, 1), top_k=(2, 2), num_classes=3)).eval()
    with stream_routing(dit, tmp_path / "run"), torch.no_grad():
        for step in (9, 1):
            dit(torch.randn(2, 4, 8, 8), torch.tensor(step), torch.tensor([0, 2]))
    recording = Recording(tmp_path / "run")
    tokens = recording.tokens(recording.layers[0])
    assert len(recording.layers) == 2
    assert tokens.labels["time_step"].tolist() == [9] * 32 + [1] * 32
    assert tokens.labels["class"].tolist() == ([0] * 16 + [2] * 16) * 2


def test_moa_encoder_decoder_and_cross_attention_while_it_translates(tmp_path):
    from mixhead.models.moa import MoATransformerConfig, MoATransformerForConditionalGeneration

    config = MoATransformerConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_heads=4, head_dim=4, active_heads=2,
        encoder_layers=1, decoder_layers=1,
    )  # fmt: skip
    model = MoATransformerForConditionalGeneration(config).eval()
    ids_BN = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    with stream_routing(model, tmp_path / "run"):
        out_BN = model.generate(ids_BN, attention_mask=ids_BN != 0, max_new_tokens=5, min_new_tokens=5, num_beams=1)
    recording = Recording(tmp_path / "run")
    encoder = [name for name in recording.layers if "encoder" in name]
    decoder = [name for name in recording.layers if "decoder" in name]
    assert len(encoder) == 1
    assert len(decoder) == 2  # self-attention and cross-attention
    assert recording.tokens(encoder[0]).labels["token"].tolist() == [5, 6, 7, 8, 9, 10]
    for name in decoder:
        tokens = recording.tokens(name)
        for row in range(2):
            mine = tokens.row == row
            assert tokens.labels["token"][mine].tolist() == out_BN[row, :-1].tolist()
            assert tokens.position[mine].tolist() == [*range(5)]
            assert len({*tokens.sequence[mine]}) == 1
        assert (recording.selected(name).sum(-1) == 2).all()


@pytest.mark.parametrize("router", ["two_stage", "linear", "query_norm"])
def test_a_module_of_ones_own(router):
    layer = mixhead.MixtureOfHeadAttention(8, 4, 1, 2, router=router)
    with mixhead.record_routing(layer) as log:
        _, routing = layer(torch.randn(1, 3, 8), return_routing=True)
    assert [name for name, _ in log.layers] == ["router"]
    assert torch.equal(log.layers[0][1].selected_BNH, routing.selected_BNH)
