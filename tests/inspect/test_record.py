"""Recordings of what a model reads, writes and draws."""

import pytest
import torch

from mixhead.cli.app import run
from mixhead.inspect.record import picture_files, png_of, record_drawing
from mixhead.recording import Recording
from mixhead.report.contents import read_contents

pytest.importorskip("diffusers", reason="diffusers is not installed")


@pytest.fixture
def pipeline():
    from diffusers import DDIMScheduler

    from mixhead.models.moh_dit import MoHDiT, MoHDiTConfig, MoHDiTPipeline, MoHDiTTransformer2DModel

    config = MoHDiTConfig(
        sample_size=8, in_channels=3, hidden_size=24, depth=2, num_heads=4, head_dim=6, shared_heads=1, top_k=2,
        num_classes=2, learn_sigma=False,
    )  # fmt: skip
    transformer = MoHDiTTransformer2DModel.from_dit(MoHDiT(config).eval())
    return MoHDiTPipeline(transformer, DDIMScheduler(), id2label={0: "boat", 1: "bag"})


def test_a_drawing_is_recorded_over_its_time_steps(pipeline, tmp_path):
    recording, pictures = record_drawing(pipeline, [1, 0], tmp_path / "run", steps=3)
    tokens = recording.tokens(recording.layers[0])
    assert len(set(tokens.labels["time_step"].tolist())) == 3
    contents = read_contents(recording)
    assert [group.value for group in contents.groups_by("class")] == ["boat", "bag"]
    assert {shown.title for shown in contents.axes[0].sequences} == {"Picture 1 (bag)", "Picture 2 (boat)"}
    assert {shown.grid for shown in contents.axes[0].sequences} == {(4, 4)}
    assert len(pictures) == 2
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)


def test_the_command_draws_and_shows(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    page, kept = tmp_path / "page.html", tmp_path / "kept"
    assert run(["inspect", str(tmp_path / "model"), "--draw", "3", "--out", str(page), "--save", str(kept)]) == 0
    assert page.read_text("utf-8").count("data:image/png;base64,") == 3
    assert Recording(kept).tokens("blocks.0.attention").labels["class"].max() == 1


def test_folders_of_pictures_and_their_classes(tmp_path):
    hidden = ("boat/._1.png", ".ipynb_checkpoints/1.png", "bag/.ipynb_checkpoints/1-checkpoint.png")
    for name in ("bag/1.png", "bag/2.png", "boat/1.png", "boat/notes.txt", *hidden):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(png_of(torch.zeros(3, 4, 4, dtype=torch.uint8)))
    found = picture_files(tmp_path, most_of_each=1)
    assert [(file.name, of_class) for file, of_class in found.items()] == [("1.png", "bag"), ("1.png", "boat")]
    assert picture_files(tmp_path / "bag" / "2.png") == {tmp_path / "bag" / "2.png": ""}
