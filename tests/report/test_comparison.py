"""The picture of a comparison of models."""

import math

import pytest

from mixhead.report.comparison import plot_perplexity
from mixhead.tasks.language_modelling.comparison_table import Comparison, Row
from mixhead.tasks.language_modelling.evaluate import Perplexity

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """`drawn(perplexities)`: the axes of the picture."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *given, **more: figures.append(self) or save(self, *given, **more)
    )

    def draw(perplexities):
        rows = [Row(f"model {n}", 7, 9, 0, Perplexity(math.log(of), 9, 1.0)) for n, of in enumerate(perplexities)]
        plot_perplexity(Comparison("", tuple(rows)), tmp_path / "perplexity.png")
        assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1].axes[0]

    return draw


@pytest.mark.parametrize("values", [[30.0, 90.0], [30.27, 30.79, 32.37], [30.0], [20.0, 5000.0]])
def test_a_point_for_every_model_and_no_bar_from_an_axis_that_is_cut_off(drawn, values):
    axes = drawn(values)
    assert not axes.patches
    assert axes.collections[0].get_offsets()[:, 0].tolist() == pytest.approx(values)
    low, high = axes.get_xlim()
    assert low < min(values) <= max(values) < high
    ticks = [label.get_text() for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    assert len(ticks) >= 2
    assert all(tick.replace(".", "").isdigit() for tick in ticks)  # 40, not 4 x 10^1
    assert [text.get_text() for text in axes.texts] == [f"{value:.2f}" for value in values]
