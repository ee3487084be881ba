"""A task of one's own: settings, a trainer that says what a step costs, `build`, `measure`, a line in the table."""

import subprocess
import sys
from pathlib import Path

import pytest
from line_task import SETTINGS, LineTrainer, losses

from mixhead.cli.app import run
from mixhead.tasks.registry import train_recipe
from mixhead.training.recipes import Recipe


def test_it_trains_is_measured_and_leaves_a_recipe_that_runs_again(tmp_path, monkeypatch, capsys):
    result = train_recipe(Recipe("line", "line", SETTINGS), tmp_path / "run")
    assert result.metrics["slope"] == pytest.approx(3, abs=0.3) and result.resumed_from == 0
    assert losses(tmp_path / "run")[0] == "loss" and len(losses(tmp_path / "run")) == 41
    monkeypatch.chdir(tmp_path)
    assert run(["train", "run/recipe.yaml"]) == 0
    assert "slope" in capsys.readouterr().out
    assert losses(Path("runs/recipe")) == losses(tmp_path / "run")


def test_it_is_stopped_and_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    train_recipe(Recipe("line", "line", SETTINGS), tmp_path / "whole")
    finish = LineTrainer.finish_step

    def stop(self):
        self.interrupted = self.state.global_step == 16
        return finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(LineTrainer, "finish_step", stop)
        with pytest.raises(KeyboardInterrupt, match="after step 17 of 40"):
            train_recipe(Recipe("line", "line", SETTINGS), tmp_path / "run")
    # Its own recipe finds the folder.
    assert run(["train", str(tmp_path / "run" / "recipe.yaml"), "--resume"]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_micro_batches_add_up_to_the_step(tmp_path):
    parts = {**SETTINGS, "batch_size": 2, "gradient_accumulation": 2}
    for name, settings in (("whole", SETTINGS), ("parts", parts)):
        train_recipe(Recipe("line", "line", settings), tmp_path / name)
    whole, cut = ([float(loss) for loss in losses(tmp_path / name)[1:]] for name in ("whole", "parts"))
    assert cut == pytest.approx(whole, rel=1e-3)


def test_unknown_tasks_are_told_from_known_ones(capsys, tmp_path):
    (tmp_path / "game.yaml").write_text("# A game\ntask: game\n")
    assert run(["train", str(tmp_path / "game.yaml")]) == 2
    assert "choose one of class_conditional_generation" in " ".join(capsys.readouterr().err.split())


WITHOUT = """
import sys
missing = "PIL diffusers peft datasets sentencepiece sacrebleu torchmetrics lm_eval matplotlib tensorboard gguf gradio"
sys.modules |= dict.fromkeys(missing.split())
from mixhead.tasks.registry import TASKS
from mixhead.data.image_files import read_image
from mixhead.errors import MixheadError
try:
    read_image(b"a picture", "name")
except MixheadError as error:
    print(len(TASKS), error)
"""


def test_tasks_are_known_without_anything_optional():
    """Text is trained on without Pillow; what asks for a picture says how to get it."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=120)
    assert "Images need Pillow: install it with `pip install 'mixhead[vision]'`." in done.stdout, done.stderr
