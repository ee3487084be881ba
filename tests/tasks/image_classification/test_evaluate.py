"""Accuracy, confusion and load by class of a model whose answers are known; single images; pictures; the verbs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import mixhead
from mixhead.cli.app import run
from mixhead.cli.classify import picture_name
from mixhead.data.labelled_images import FolderImages, folder_images
from mixhead.errors import MixheadError
from mixhead.models.moh_vit import MoHTransNeXtConfig, MoHTransNeXtForImageClassification, image_processor
from mixhead.report.contents import read_contents
from mixhead.report.vision import plot_heads, plot_load
from mixhead.tasks.image_classification.classify import classify
from mixhead.tasks.image_classification.evaluate import evaluate_images, load_classifier

CLASSES = ("bright", "dark")
LABELS = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: n for n, name in enumerate(CLASSES)}}


@pytest.fixture(scope="module")
def moh_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MoH-ViT that says bright or dark by its last bias alone: always bright."""
    config = MoHTransNeXtConfig(
        image_size=16, patch_size=4, hidden_sizes=(8, 16), num_heads=(2, 4), depths=(1, 1), mlp_ratios=(2, 2),
        pool_ratios=(2, 1), shared_heads=(2, 1), top_k=(0, 2), **LABELS,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MoHTransNeXtForImageClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([1.0, 0.0]))
    folder = tmp_path_factory.mktemp("model") / "moh"
    mixhead.save(model, image_processor(config), folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> FolderImages:
    """Three bright images and one dark one."""
    generator = np.random.default_rng(0)
    for name, count, low in (("bright", 3, 150), ("dark", 1, 0)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(low, low + 100, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    return folder_images(tmp_path / "data")


def test_what_is_measured(moh_vit: Path, images: FolderImages):
    model, processor, classes = load_classifier(moh_vit)
    assert classes == CLASSES
    result = evaluate_images(model, processor, images, batch_size=3)
    assert result.confusion_CL.tolist() == [[3, 0], [1, 0]]
    assert (result.images, result.top1_accuracy, result.top5_accuracy) == (4, 0.75, 1.0)
    first, last = result.load
    assert result.competes[first].tolist() == [False, False], "both heads of the first stage are shared"
    assert result.load[first].tolist() == [[1, 1], [1, 1]]
    torch.testing.assert_close(result.load[last].sum(1), torch.tensor([3.0, 3.0]))
    assert result.active_share == pytest.approx(5 / 6)
    assert json.loads(result.to_json())["top1"] == 0.75


def test_the_load_does_not_depend_on_the_batches(moh_vit: Path, images: FolderImages):
    model, processor, _ = load_classifier(moh_vit)
    some, all_at_once = (evaluate_images(model, processor, images, size) for size in (1, 4))
    for name in some.load:
        torch.testing.assert_close(some.load[name], all_at_once.load[name])


def test_unreadable_images_are_left_out_and_listed(moh_vit: Path, images: FolderImages):
    model, processor, _ = load_classifier(moh_vit)
    images.files[0].write_text("no picture")
    result = evaluate_images(model, processor, images)
    assert result.images == 3
    assert result.unreadable == (str(images.files[0]),)
    for file in images.files:
        file.write_text("no picture")
    with pytest.raises(MixheadError, match="None of the 4 images"):
        evaluate_images(model, processor, images)


def test_a_converted_vit_is_measured_and_shown(tmp_path: Path, images: FolderImages):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, **LABELS))
    mixhead.convert(model, mixhead.MoHConfig(active_heads=3))
    mixhead.save(model, ViTImageProcessorPil(size={"height": 16, "width": 16}), tmp_path / "vit")
    model, processor, _ = load_classifier(tmp_path / "vit")
    assert evaluate_images(model, processor, images).active_share == pytest.approx(0.75)
    found = classify(model, processor, images.files[0], CLASSES)
    assert (found.used, found.heads) == (6, 8)
    assert found.map_of().selected_YXH.shape == (4, 4, 4), "the class token is no patch"
    plot_heads(found, tmp_path / "heads.png")
    assert Image.open(tmp_path / "heads.png").width > 100


def test_a_map_has_the_sides_of_the_image(tmp_path: Path, images: FolderImages):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=(16, 32), patch_size=4, **LABELS))
    mixhead.calibrate(mixhead.convert(model, mixhead.MoHConfig(active_heads=2)), [torch.randn(8, 3, 16, 32)])
    mixhead.save(model, ViTImageProcessorPil(size={"height": 16, "width": 32}), tmp_path / "vit")
    model, processor, _ = load_classifier(tmp_path / "vit")
    found = classify(model, processor, images.files[0], CLASSES)
    with mixhead.record_routing(model, tmp_path / "kept"):
        model(found.pixels_CYX[None])
    layer = found.map_of().layer
    codes_TH = mixhead.Recording(tmp_path / "kept").codes(layer)
    assert found.map_of().selected_YXH.shape == (4, 8, 4)
    assert (found.map_of().selected_YXH.flatten(0, 1).numpy() == (codes_TH[1:] > 0)).all(), "patches in their order"
    command = ["inspect", str(tmp_path / "vit"), "--images", str(images.files[0].parents[1]), "--terminal", "--save"]
    assert run([*command, str(tmp_path / "pictures")]) == 0
    shown = read_contents(mixhead.Recording(tmp_path / "pictures")).axes[0].sequences
    assert {(of.grid, of.prefix) for of in shown} == {((4, 8), 1)}


def test_layers_that_do_not_route_use_all_their_heads(images: FolderImages):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, **LABELS))
    mixhead.convert(model, mixhead.MoHConfig(active_heads=(4, 2)))
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    assert evaluate_images(model, processor, images).active_share == pytest.approx(0.75)
    found = classify(model, processor, images.files[0], CLASSES)
    assert (found.used, found.heads) == (6, 8)


def test_pictures_of_files_with_the_same_name_stand_side_by_side():
    files = [Path("a/0.jpg"), Path("b/0.jpg"), Path("b/0.png"), Path("b/1.png")]
    names = [picture_name(file, files) for file in files]
    assert names == ["a-0-jpg-heads.png", "b-0-jpg-heads.png", "b-0-png-heads.png", "1-heads.png"]


def test_a_single_image(moh_vit: Path, images: FolderImages):
    model, processor, classes = load_classifier(moh_vit)
    found = classify(model, processor, images.files[3], classes)
    assert found.labels == ("bright", "dark")
    assert found.probabilities[0] == pytest.approx(0.7311, abs=1e-3)
    assert (found.used, found.heads) == (5, 6)
    heads = found.map_of()
    assert heads.selected_YXH.shape == (2, 2, 4)
    assert (heads.selected_YXH.sum(-1) == 3).all()
    assert (heads.carrying_YX > 1.9).all()
    assert (heads.carrying_YX <= 3.001).all()
    with pytest.raises(MixheadError, match="layers of the model that route"):
        found.map_of("no such layer")


def test_a_dense_model_uses_all_heads_and_has_no_map(images: FolderImages, tmp_path: Path):
    config = MoHTransNeXtConfig(
        image_size=16, patch_size=4, hidden_sizes=(8, 16), num_heads=(2, 4), depths=(1, 2), mlp_ratios=(2, 2),
        pool_ratios=(2, 1), **LABELS,
    )  # fmt: skip
    model = MoHTransNeXtForImageClassification(config).eval()
    found = classify(model, image_processor(config), images.files[0], CLASSES)
    assert (found.used, found.heads) == (10, 10)
    with pytest.raises(MixheadError, match="dense model"):
        plot_heads(found, tmp_path / "heads.png")
    with pytest.raises(MixheadError, match="No heads compete"):
        plot_load(evaluate_images(model, image_processor(config), images), tmp_path / "load.png")


def test_the_verbs(moh_vit: Path, images: FolderImages, tmp_path: Path, capfd: pytest.CaptureFixture):
    data = str(images.files[0].parents[1])
    assert run(["evaluate-images", str(moh_vit), data, "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert "75.00%" in capfd.readouterr().out
    assert (tmp_path / "out" / "confusion.csv").read_text().splitlines()[1] == "bright,3,0"
    for picture in ("confusion.png", "load.png"):
        assert Image.open(tmp_path / "out" / picture).width > 100
    bad = tmp_path / "bad.jpg"
    bad.write_text("no picture")
    files = [str(bad), str(images.files[0])]
    assert run(["classify", str(moh_vit), *files, "--overlay", str(tmp_path / "maps")]) == 2
    printed = capfd.readouterr()
    assert "bad.jpg is no image" in " ".join(printed.err.split())  # lines are wrapped at any place
    assert "heads used: 5 of 6" in printed.out
    assert Image.open(tmp_path / "maps" / "0-heads.png").width > 100
    assert run(["evaluate-images", str(moh_vit), str(tmp_path / "nowhere")]) == 2
    capfd.readouterr()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--layer", "none"], "No layer 'none' routes: choose one of"),
        (["--class", "grey"], "The class 'grey' is unknown or has no image"),
        (["--out", "file"], "file is a file: name a folder"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_measured(
    options: list[str], sentence: str, moh_vit: Path, images: FolderImages, tmp_path: Path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mixhead.tasks.image_classification.evaluate.logits_of", None)
    monkeypatch.setattr("mixhead.tasks.image_classification.classify.logits_of", None)
    (tmp_path / "file").touch()
    out = [] if "--out" in options else ["--out", "out"]
    assert run(["evaluate-images", str(moh_vit), str(images.files[0].parents[1]), *out, *options]) == 2
    assert sentence in " ".join(capfd.readouterr().err.split())
    if "--layer" in options:
        assert run(["classify", str(moh_vit), str(images.files[0]), "--overlay", "out", *options]) == 2
        assert sentence in " ".join(capfd.readouterr().err.split())


def test_a_folder_is_no_image(moh_vit: Path, tmp_path: Path, capfd):
    assert run(["classify", str(moh_vit), str(tmp_path)]) == 2
    assert "is a folder" in " ".join(capfd.readouterr().err.split())


def test_folders_that_hold_no_classifier(tmp_path: Path, moh_vit: Path):
    model = mixhead.load(moh_vit)
    mixhead.save(model.vit, None, tmp_path / "backbone")
    with pytest.raises(MixheadError, match="no image classifier"):
        load_classifier(tmp_path / "backbone")
    mixhead.save(model, None, tmp_path / "bare")
    assert load_classifier(tmp_path / "bare")[1].crop_size["height"] == 16, "MoH-ViT has a processor of its own"
