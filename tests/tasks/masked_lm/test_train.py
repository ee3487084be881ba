"""Masked language modelling: masks, training, perplexity, gaps."""

from pathlib import Path

import pytest
import torch

from mixhead.cli.app import run as run_cli
from mixhead.data.vocabulary import train_vocabulary
from mixhead.errors import MixheadError
from mixhead.models.moa import MoAEncoderConfig, MoAForMaskedLM
from mixhead.models.moa.modeling import IGNORED
from mixhead.tasks.masked_lm.train import (
    MaskedBatches,
    fill_mask,
    load_masked_lm,
    mask_tokens,
    masked_texts,
)
from mixhead.tasks.registry import settings_of, train_recipe
from mixhead.training.recipes import Recipe, read_recipe

TEXT = "the cat sees the dog and the dog sees the cat . " * 400


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wikitext")
    for part in ("train", "valid", "test"):
        (folder / f"wiki.{part}.tokens").write_text(TEXT, encoding="utf-8")
    return folder


def recipe(data: Path, **changes: object) -> Recipe:
    values = {
        "data": str(data),
        "vocabulary": 300,
        "model": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_heads": 4,
            "active_heads": 2,
            "head_dim": 16,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "window": 24,
        "batch_size": 8,
        "steps": 120,
        "warmup": 1 / 6,
        "learning_rate": 1e-2,
        "save_every": 60,
        "average": 1,
        "precision": "float32",
    }
    return Recipe("cats", "masked_lm", {**values, **changes})


def test_a_model_learns_what_stands_behind_masks(
    wikitext: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train_recipe(recipe(wikitext), tmp_path / "run")
    assert result.metrics["masked perplexity"] < 6  # there are seven words; what has learnt nothing is at 300
    model, tokenizer = load_masked_lm(result.folder)
    before, after = "the cat sees the", "and the dog sees the cat ."
    [guesses] = fill_mask(model, tokenizer, f"{before} <mask> {after}", 3)
    left, right = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after))
    with torch.no_grad():
        logits_NV = model(torch.tensor([[*left, tokenizer.mask_token_id, *right]])).logits[0]
    likeliest = logits_NV[len(left)].softmax(-1).topk(3)
    assert [word for word, _ in guesses] == [tokenizer.decode([token]) for token in likeliest.indices]
    assert [chance for _, chance in guesses] == pytest.approx(likeliest.values.tolist())
    with pytest.raises(MixheadError, match="no gap"):
        fill_mask(model, tokenizer, "no gap here")
    assert run_cli(["fill-mask", str(result.folder), "the <mask> sees the dog", "--guesses", "2"]) == 0
    assert "probability" in capsys.readouterr().out
    log = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert len(log) == 121 and {"auxiliary", "task_loss", "load_entropy"} <= set(log[0].split(","))


def test_the_recipe_of_a_run_makes_it_again(wikitext: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(wikitext)
    train_recipe(recipe(Path(), steps=3), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    resolved = str(tmp_path / "run" / "recipe.yaml")
    assert run_cli(["train", resolved]) == 0
    losses = [
        (folder / "log.csv").read_text().splitlines()[1].split(",")[2] for folder in (Path("run"), Path("runs/recipe"))
    ]
    assert losses[0] == losses[1]
    assert run_cli(["train", resolved, "seed=1", "--resume"]) == 2
    assert run_cli(["train", resolved, "--resume"]) == 0


def test_targets_are_masked_replaced_or_left() -> None:
    tokenizer = train_vocabulary([TEXT], 280)
    ids_BN = torch.randint(4, 280, (200, 100))
    ids_BN[:, 0] = tokenizer.eos_token_id
    seen_BN, labels_BN = mask_tokens(ids_BN, tokenizer, 0.15, torch.Generator().manual_seed(0))
    target_BN = labels_BN != IGNORED
    assert float(target_BN[:, 1:].float().mean()) == pytest.approx(0.15, abs=0.01)
    assert not target_BN[:, 0].any()
    assert torch.equal(seen_BN[~target_BN], ids_BN[~target_BN])
    assert torch.equal(labels_BN[target_BN], ids_BN[target_BN])
    masked = (seen_BN == tokenizer.mask_token_id)[target_BN].float().mean()
    kept = (seen_BN == ids_BN)[target_BN].float().mean()
    assert float(masked) == pytest.approx(0.8, abs=0.02) and float(kept) == pytest.approx(0.1, abs=0.02)


def test_every_window_comes_once_a_round_with_other_masks() -> None:
    tokenizer = train_vocabulary([TEXT], 280)
    windows_WN = torch.arange(4, 4 + 6 * 10).view(6, 10)
    batches = MaskedBatches(windows_WN, tokenizer, 3, 0.5, seed=0)
    shown = [
        torch.where(b["labels"] == IGNORED, b["input_ids"], b["labels"]) for b in map(batches.__getitem__, range(4))
    ]
    for first in (0, 2):
        found = torch.cat(shown[first : first + 2])
        assert torch.equal(found[found[:, 0].argsort()], windows_WN)
    assert torch.equal(batches[1]["input_ids"], batches[1]["input_ids"])


def test_scoring_targets_alone_changes_no_loss() -> None:
    torch.manual_seed(0)
    config = MoAEncoderConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_heads=2, active_heads=1,
        head_dim=8, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, switch_weight=0.0, z_weight=0.0,
    )  # fmt: skip
    model = MoAForMaskedLM(config)
    ids = torch.randint(4, 60, (2, 9))
    labels = ids.masked_fill(torch.arange(9) % 3 > 0, IGNORED)
    in_training, in_evaluation = model.train()(ids, labels=labels), model.eval()(ids, labels=labels)
    torch.testing.assert_close(in_training.loss, in_evaluation.loss)
    assert in_training.logits.shape == (1, 6, 60) and in_evaluation.logits.shape == (2, 9, 60)


def test_texts_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MixheadError, match=r"wiki\.train\.tokens or wiki\.train\.raw"):
        masked_texts(str(tmp_path), "train")
    assert len(masked_texts("addresses", "test")) > 10


@pytest.mark.parametrize("name", ["moa-mlm", "moa-mlm-wikitext103"])
def test_shipped_recipes_are_complete(name: str) -> None:
    assert settings_of(read_recipe(name)).steps > 0
