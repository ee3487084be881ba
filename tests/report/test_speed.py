"""Measured speeds in a document: a column for each share, and nothing reached that was not."""

from mixhead.bench.results import SKIPPED, Results, Row
from mixhead.bench.timing import Ratio
from mixhead.report.speed import speed_markdown


def row(share, **values):
    return Row(
        "core", "forward", "1 x 64, causal", "float32", "random", share, values.pop("threads", 1), "cpu", **values
    )


def lines_of(*rows):
    results = Results("mixhead bench core", 7, rows=list(rows))
    return [line for line in speed_markdown(results).splitlines() if line.startswith("|")]


def test_a_line_for_each_case_and_a_column_for_each_share():
    timed = {"wall_ms": 9.0, "cpu_ms": 4.0}
    head, _, line = lines_of(row(0.5, dense=Ratio(9.9, 2.5), **timed), row(1.0, dense=Ratio(9.9, 1.25), **timed))
    assert head == "| case | dtype | threads | engine | 100% of heads | 50% of heads |"
    assert line == "| forward, 1 x 64, causal | float32 | 1 | cpu | 1.25, 4 ms | 2.50, 4 ms |"


def test_several_threads_count_by_the_wall_clock():
    assert (
        "| 2 | cpu | 3.00, 9 ms |" in lines_of(row(0.5, threads=2, dense=Ratio(3.0, 1.0), wall_ms=9.0, cpu_ms=4.0))[2]
    )


def test_a_missed_figure_says_so_and_gates_count_where_they_are_asked_for():
    values = {"dense": Ratio(1.0, 1.5), "gated": Ratio(1.0, 0.9), "wall_ms": 1.0, "cpu_ms": 1.0, "required": 0.98}
    assert "0.90 (missed: 0.98)" in lines_of(row(0.5, required_of_gated=True, reached=False, **values))[2]
    assert "| 1.50, 1 ms |" in lines_of(row(0.5, reached=True, **values))[2]


def test_what_was_not_timed_has_no_number():
    text = speed_markdown(Results("c", 7, rows=[row(0.5, status=SKIPPED, note="no kernel")]))
    assert "| cpu | skipped |" in text
    assert "- cpu: skipped, no kernel" in text
