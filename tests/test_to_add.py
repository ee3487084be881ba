"""A toy of everything that the table "to add X, write Y" of docs/architecture.md promises, added as it says there.

Each toy is the one thing that the table asks for; `monkeypatch` writes the one line.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

import mixhead
from mixhead import store
from mixhead.cli.app import run
from mixhead.data import fetch, labelled_images, text
from mixhead.data.labelled_images import ArrayImages, open_images
from mixhead.errors import MixheadError
from mixhead.models import auto
from mixhead.nn import MixtureOfHeadAttention
from mixhead.ops import IMPLEMENTATIONS, Engine, head_attention
from mixhead.ops.engine import asked_for
from mixhead.ops.engine import table as engines_by_name
from mixhead.report import plots
from mixhead.routing import ROUTERS, Router, RouterKind, Routing
from mixhead.tasks.image_generation import metrics
from mixhead.tasks.registry import TASKS
from mixhead.training.config import RunConfig
from mixhead.training.run import Task
from mixhead.training.trainer import PartOfStep, RunTrainer, Samples

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| (?:a|an) ([\w ]+?) \| (.+) \| (.+) \|$", flags=re.MULTILINE)


def rows():
    """The table: what is added, what is written and where, the line."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.split("## To add something", 1)[1].split("\n## ", 1)[0]
    return {name: (written, line) for name, written, line in ROW.findall(section)}


def test_the_table_names_what_is_there_and_each_row_has_a_toy():
    toys = {name.removeprefix("test_a_toy_").replace("_", " ") for name in globals() if name.startswith("test_a_toy_")}
    assert rows().keys() == toys
    for written, line in rows().values():
        for place in re.findall(r"`((?:ops|routing|models|data|tasks|report|tests|src)/[\w/.]*)`", written + line):
            path = (ROOT if place.startswith("tests/") else ROOT / "src" / "mixhead") / place
            assert path.exists(), f"docs/architecture.md names {place}, which is not there"
        for table, file in re.findall(r"`([A-Z_]+)` in `([\w/.]+)`", line):
            source = (ROOT / "src" / "mixhead" / file).read_text(encoding="utf-8")
            assert re.search(rf"^{table}\b.*=", source, flags=re.MULTILINE), f"there is no {table} in {file}"


# A router


class FirstHeads(Router):
    """Every token uses the first heads."""

    def __init__(self, num_heads, active_heads):
        super().__init__()
        self.num_heads, self.active_heads = num_heads, active_heads
        self.bias = nn.Linear(1, num_heads)

    def forward(self, hidden_BNC, q_BHND=None, token_mask_BN=None):
        gates_BNH = (torch.arange(self.num_heads) < self.active_heads).float().expand(*hidden_BNC.shape[:2], -1)
        return Routing(gates_BNH, gates_BNH > 0, token_mask_BN=token_mask_BN)


def test_a_toy_router(monkeypatch, tmp_path):
    monkeypatch.setitem(ROUTERS, "first", RouterKind(lambda c, h, s, k, g: FirstHeads(h, s + k), balance=0.5))
    layer = MixtureOfHeadAttention(16, 4, 0, 2, router="first")
    _, routing = layer(torch.randn(1, 3, 16), return_routing=True)
    assert routing.selected_BNH[0, 0].tolist() == [True, True, False, False]
    layer.router.bias.weight.data.fill_(9.0)
    layer.router.reset_parameters()  # as loading asks where a file has none
    assert (layer.router.bias.weight < 9).all()
    sizes = LlamaConfig(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, vocab_size=20)
    model = mixhead.convert(LlamaForCausalLM(sizes).eval(), mixhead.MoHConfig(active=0.5, router="first"))
    assert model.config.moh["balance_coefficient"] == 0.5
    store.save(model, None, tmp_path / "model")
    ids = torch.arange(5)[None]
    torch.testing.assert_close(store.load(tmp_path / "model").eval()(ids).logits, model(ids).logits)


# An engine


def test_a_toy_engine(monkeypatch):
    def attend(q_BHND, k_BKTD, v_BKTD, routing, *, causal, scale, attn_mask):
        return torch.full_like(q_BHND, scale)

    def refusal(q_BHND, k_BKTD, v_BKTD, routing, attn_mask):
        return "it takes no mask" if attn_mask is not None else None

    monkeypatch.setitem(IMPLEMENTATIONS, "toy", Engine("toy", attend, refusal))
    q = torch.randn(1, 2, 3, 4)
    routing = Routing.from_gates(torch.ones(1, 3, 2))
    assert (head_attention(q, q, q, routing, impl="toy") == 0.5).all()
    with pytest.raises(MixheadError, match="it takes no mask"):
        head_attention(q, q, q, routing, attn_mask=torch.ones(3, 3, dtype=torch.bool), impl="toy")


# An operator


def summed(x_BNHD, routing):
    """The reference: what the selected heads of a token say, times their gates, summed up."""
    return torch.where(routing.selected_BNH.unsqueeze(-1), x_BNHD * routing.gates_BNH.unsqueeze(-1), 0.0).sum(2)


def summed_by_product(x_BNHD, routing):
    gates_BNH = torch.where(routing.selected_BNH, routing.gates_BNH, 0.0)
    return (gates_BNH.unsqueeze(2) @ x_BNHD).squeeze(2)


def refuses_integers(x_BNHD):
    return None if x_BNHD.is_floating_point() else "it multiplies floating-point numbers"


SUMS = engines_by_name(Engine("reference", summed), Engine("product", summed_by_product, refuses_integers))


def sum_heads(x_BNHD, routing, *, impl="auto"):
    engine = SUMS["product"] if impl == "auto" else asked_for(impl, SUMS, x_BNHD)
    return engine.run(x_BNHD, routing)


def test_a_toy_operator():
    x_BNHD, routing = torch.randn(2, 3, 4, 5), Routing.from_gates(torch.rand(2, 3, 4).round(decimals=1))
    torch.testing.assert_close(sum_heads(x_BNHD, routing), sum_heads(x_BNHD, routing, impl="reference"))
    with pytest.raises(MixheadError, match="impl='product' cannot take these arguments: it multiplies"):
        sum_heads(x_BNHD.long(), routing, impl="product")
    with pytest.raises(MixheadError, match="choose 'auto' or one of reference, product"):
        sum_heads(x_BNHD, routing, impl="fast")


# A model family


class ToyConfig(auto.LoadsItsModels, PreTrainedConfig):
    model_type = "moh_toy"
    modeling = __name__

    hidden_size: int = 16
    num_heads: int = 4


class ToyModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.attention = MixtureOfHeadAttention(config.hidden_size, config.num_heads, 1, 1)
        self.post_init()

    def forward(self, hidden_BNC):
        return self.attention(hidden_BNC)


def test_a_toy_model_family(monkeypatch, tmp_path):
    monkeypatch.setattr(auto, "CONFIGURATIONS", [f"{__name__}.ToyConfig"])
    auto.register_configurations()
    AutoModel.register(ToyConfig, ToyModel, exist_ok=True)
    model = ToyModel(ToyConfig(num_heads=2)).eval()
    store.save(model, None, tmp_path / "model")
    again, states = store.load(tmp_path / "model").eval(), torch.randn(1, 5, 16)
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "model"), ToyConfig) and isinstance(again, ToyModel)
    torch.testing.assert_close(again(states), model(states))
    with mixhead.record_routing(model) as log:
        model(states)
    assert list(log.load()) == ["attention"]


# A data set


def test_a_toy_data_set(monkeypatch, tmp_path):
    def squares(folder: Path, split):
        pixels = np.load(folder / "squares.npy")
        return ArrayImages(("dark", "bright"), np.array([0, 1]), pixels, f"squares/{split}")

    monkeypatch.setitem(fetch.SOURCES, "squares", fetch.Source("npm", ("squares",), ("package",), "MIT", "two squares"))
    monkeypatch.setitem(labelled_images.NAMED, "squares", squares)
    monkeypatch.setenv("MIXHEAD_CACHE", str(tmp_path))
    with pytest.raises(MixheadError, match="`mixhead fetch squares` downloads it"):
        open_images("squares", "train")
    (tmp_path / "data" / "squares").mkdir(parents=True)
    np.save(tmp_path / "data" / "squares" / "squares.npy", np.array([[[0]], [[255]]], dtype=np.uint8))
    images = open_images("squares", "test")
    assert images.classes == ("dark", "bright") and images.read(1).getpixel((0, 0)) == (255, 255, 255)


# A task


@dataclass(frozen=True, kw_only=True)
class LineConfig(RunConfig):
    steps: int = 40
    learning_rate: float = 0.3
    precision: str = "float32"


class LineTrainer(RunTrainer[LineConfig]):
    columns = ("loss",)
    unit = "points"

    def __init__(self, config: LineConfig, run: Path) -> None:
        x = torch.linspace(-1, 1, 16).unsqueeze(1)
        samples = Samples(
            dataset=lambda length: [{"x": x[place % 16]} for place in range(length)],
            collate=lambda points: {"x": torch.stack([point["x"] for point in points])},
            steps=lambda per_step: config.steps,
            batch_size=4,
        )
        super().__init__(nn.Linear(1, 1), config, samples, run)

    def part_of_step(self, model, inputs, targets):
        return PartOfStep((model(inputs["x"]) - 3 * inputs["x"]).square().mean(), self.equal_share)

    def write_model(self, folder: Path) -> None:
        torch.save(self.model.state_dict(), folder / "model.pt")


def measure(trainer: LineTrainer, folder: Path):
    return {"slope": trainer.model.weight.item()}


def test_a_toy_task(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(TASKS, "line", Task(LineConfig, LineTrainer, measure))
    (tmp_path / "line.yaml").write_text("# A line\ntask: line\nseed: 1\n")
    monkeypatch.chdir(tmp_path)
    assert run(["train", "line.yaml"]) == 0
    assert "slope" in capsys.readouterr().out


# A metric


def test_a_toy_metric(monkeypatch):
    toy = metrics.Metric("how many more", lambda generated, real: float(generated.count - real.count))
    monkeypatch.setitem(metrics.METRICS, "more", toy)
    drawn, real = metrics.ImageStatistics(), metrics.ImageStatistics()
    for statistics, count in ((drawn, 9), (real, 5)):
        features = torch.randn(count, 3)
        statistics.pooled.update(features)
        statistics.subset.update(features)
    assert metrics.compare("made up", drawn, real)["more"] == 4


# A plot


def test_a_toy_plot(monkeypatch, tmp_path, talking_llama):
    def plot_first(contents, file, by, layer):
        figure, axes = plots.pyplot().subplots()
        axes.bar(range(4), contents.loads[layer or contents.recording.layers[0]].share_H)
        plots.save(figure, file)

    monkeypatch.setitem(plots.FIGURES, "first", plot_first)
    store.save(*talking_llama, tmp_path / "model")
    command = ["inspect", str(tmp_path / "model"), "--prompt", "the state", "--tokens", "3"]
    assert run([*command, "--plot", str(tmp_path / "first.png"), "--figure", "first"]) == 0
    assert (tmp_path / "first.png").read_bytes().startswith(b"\x89PNG")
    assert run([*command, "--plot", str(tmp_path / "x.png"), "--figure", "last"]) == 2


# A text source


def test_a_toy_text_source(monkeypatch):
    monkeypatch.setitem(text.NAMED, "poem", lambda split: [f"a {split} rose"])
    assert text.text_source("poem") == ["a train rose"]
    assert text.text_source("poem:test") == ["a test rose"]
    with pytest.raises(MixheadError, match="no part 'last'"):
        text.text_source("poem:last")
