"""The table in which models are compared."""

import dataclasses
import io
import json
import math

import pytest
from rich.console import Console

from mixhead import MixheadError
from mixhead.tasks.language_modelling.comparison_table import Comparison, Row
from mixhead.tasks.language_modelling.evaluate import Accuracy, Perplexity


@pytest.fixture
def table() -> Comparison:
    half = Accuracy(0.5, 0.0357, (True, False))
    return Comparison(
        "SmolLM2 on held-out addresses",
        (
            Row("original", 9, 9, 0, Perplexity(math.log(36), 6132, 20.0, (3.5, 3.6)), half, half, 30.0, original=True),
            Row("original, tuned", 9, 9, 1000, Perplexity(math.log(30), 6132, 20.0), half, None, 3599.7, original=True),
            Row("ours | tuned", 7, 9, 1000, Perplexity(math.log(30.6), 6132, 20.0), None, half, 125.0),
            Row("ours, budgets", 6.75, 9, 50, Perplexity(math.log(40), 6132, 20.0), None, None, 7500.0),
        ),
        ("12 windows of 512 tokens",),
    )


class TestTable:
    def test_ratio_is_to_the_original_tuned_on_the_same_tokens(self, table: Comparison) -> None:
        ratios = [table.ratio(row) for row in table.rows]
        assert ratios[:2] == [1.0, 1.0]
        assert ratios[2] == pytest.approx(1.02)
        assert ratios[3] is None

    def test_markdown(self, table: Comparison) -> None:
        assert table.to_markdown() == (
            "### SmolLM2 on held-out addresses\n\n"
            "| model | heads active | tuning tokens | perplexity "
            "| x original, same tokens | cloze | choice of 4 | wall time |\n"
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
            "| original | 9 of 9 (100.0%) | 0 | 36.00 | 1.000 | 50.0% (43–57) | 50.0% (43–57) | 30.0 s |\n"
            "| original, tuned | 9 of 9 (100.0%) | 1,000 | 30.00 | 1.000 | 50.0% (43–57) | — | 1 h 00 min |\n"
            "| ours \\| tuned | 7 of 9 (77.8%) | 1,000 | 30.60 | 1.020 | — | 50.0% (43–57) | 2 min 05 s |\n"
            "| ours, budgets | 6.75 of 9 (75.0%) | 50 | 40.00 | — | — | — | 2 h 05 min |\n"
            "\n- 12 windows of 512 tokens\n"
        )

    def test_a_ratio_has_a_band_where_both_models_read_the_same_windows(self) -> None:
        rows = [
            Row(name, 9, 9, 0, Perplexity(sum(nll) / 3, 1533, 1.0, nll), original=name == "original")
            for name, nll in {"original": (3.0, 3.1, 3.2), "ours": (3.01, 3.12, 3.21)}.items()
        ]
        first, second = Comparison("", tuple(rows)).cells()
        assert first[4] == "1.000"
        assert second[4] == "1.013 (0.999–1.028)"

    def test_nothing_is_said_of_tuning_that_nobody_knows_of(self) -> None:
        """`mixhead evaluate` is given folders; "tuning tokens 0" would be a guess."""
        rows = [
            Row(name, 9, 9, None, Perplexity(nll, 1533, 1.0), original=name == "a")
            for name, nll in {"a": 3.0, "b": 3.1}.items()
        ]
        table = Comparison("", tuple(rows))
        assert table.columns == (
            "model", "heads active", "perplexity", "x first model", "cloze", "choice of 4", "wall time"
        )  # fmt: skip
        assert [cells[3] for cells in table.cells()] == ["1.000", "1.105"]

    def test_json_spells_out_what_is_derived(self, table: Comparison) -> None:
        text = table.to_json()
        row = json.loads(text)["rows"][2]
        assert row["ratio"] == pytest.approx(1.02)
        assert row["perplexity_value"] == pytest.approx(30.6)

    def test_terminal(self, table: Comparison) -> None:
        out = io.StringIO()
        Console(file=out, width=160).print(table.to_rich())
        text = out.getvalue()
        assert all(cell in text for line in table.cells() for cell in line)
        assert "12 windows of 512 tokens" in text

    @pytest.mark.parametrize(
        "change", [{"active_heads": 0}, {"active_heads": 10}, {"tuning_tokens": -1}, {"seconds": -1.0}]
    )
    def test_impossible_row_is_refused(self, table: Comparison, change: dict[str, float]) -> None:
        with pytest.raises(MixheadError, match="The row 'original' states"):
            dataclasses.replace(table.rows[0], **change)
