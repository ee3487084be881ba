"""Recipes: YAML in, frozen dataclasses out, and a sentence for every mistake in between."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from mixhead.cli.app import run
from mixhead.errors import MixheadError
from mixhead.training.recipes import read_recipe, settings_from, shipped_recipes, summary


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Settings:
    width: int
    optimizer: Optimizer = field(default_factory=Optimizer)
    data: Path | None = None
    heads: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.width < 1:
            raise MixheadError(f"width={self.width} must be at least 1.")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("# A small one\ntask: nothing\nwidth: 4\noptimizer:\n  learning_rate: 1e-4\nheads: [1, 2]\n")
    return path


def test_a_recipe_becomes_dataclasses(recipe: Path) -> None:
    read = read_recipe(str(recipe), ["optimizer.betas=[0.9, 0.98]", "data=/some/where", "width=8"])
    assert (read.name, read.task) == ("small", "nothing")
    settings = settings_from(Settings, read.values)
    # YAML takes 1e-4, without a dot, for text.
    assert settings == Settings(8, Optimizer(1e-4, (0.9, 0.98)), Path("/some/where"), [1, 2])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("widht=3", "unknown key widht: did you mean width?"),
        ("optimizer.rate=3", "unknown key optimizer.rate: choose one of learning_rate, betas"),
        ("optimizer=3", "optimizer=3 cannot be used"),
        ("width=four", "width='four' must be a whole number"),
        ("width=0", "width=0 must be at least 1"),
        ("width", "`width` must have the form key=value"),
        ("width.more=1", "width is a value of the recipe"),
        ("heads=[1", "the value is no YAML"),
        pytest.param("heads=" + "[" * 10_000, "the value is no YAML", id="without end"),
        ("heads=2026-02-30", "the value is no YAML"),
    ],
)
def test_mistakes_are_named(recipe: Path, override: str, sentence: str) -> None:
    with pytest.raises(MixheadError) as caught:
        settings_from(Settings, read_recipe(str(recipe), [override]).values)
    assert sentence in str(caught.value)


def test_a_missing_value_is_named() -> None:
    with pytest.raises(MixheadError, match="width"):
        settings_from(Settings, {"heads": [1]})


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(MixheadError, match="neither a file nor a recipe"):
        read_recipe("no-such-recipe")
    for text, sentence in (
        ("[1, 2]", "must be a mapping"), ("a: [", "is no YAML"), ("width: 1", "must be a mapping"),
        ("[" * 10_000, "is no YAML"), ("{a: " * 10_000, "is no YAML"), ("day: 2026-02-30", "is no YAML"),
    ):  # fmt: skip
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(MixheadError, match=sentence) as refused:
            read_recipe(str(path))
        assert "\n" not in str(refused.value)
    path.write_text("# A game\ntask: [game\nx: 1 # many\n")
    with pytest.raises(MixheadError, match=r"is no YAML \(expected ',' or '\]', but got ':' in line 3\)"):
        read_recipe(str(path))


def test_the_command_line_lists_copies_and_refuses(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["recipes", "ls"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in shipped_recipes())
    assert run(["recipes", "cp", str(recipe), str(tmp_path / "copy.yaml")]) == 0
    assert (tmp_path / "copy.yaml").read_text() == recipe.read_text()
    assert run(["recipes", "cp", str(recipe), str(tmp_path / "copy.yaml")]) == 2
    monkeypatch.chdir(tmp_path)
    assert run(["recipes", "cp", "moh-vit-fashion"]) == 0
    assert (tmp_path / "moh-vit-fashion.yaml").is_file()
    assert run(["train", str(recipe)]) == 2
    assert "task 'nothing' cannot be trained" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_explain_every_key(name: str) -> None:
    path = shipped_recipes()[name]
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ") and summary(path)
    values = yaml.safe_load(text)
    assert isinstance(values["task"], str)
    for line in text.splitlines():
        key = line.split("#")[0].strip()
        assert not key or key.startswith("-") or "#" in line, f"{name}: `{key}` is not explained"
