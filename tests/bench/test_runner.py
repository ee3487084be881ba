"""Rows: verified, then timed; wrong ones have no time, refused ones a reason. Peak memory."""

import json

import pytest

from mixhead.bench.cases import PRESETS, Case, figures
from mixhead.bench.core import CoreSpec
from mixhead.bench.memory import peak_memory
from mixhead.bench.results import SKIPPED, WRONG, Results, met
from mixhead.bench.runner import Entry, Options, entries_of_figures, grid, run
from mixhead.errors import MixheadError
from mixhead.ops import IMPLEMENTATIONS, Engine, cpu
from mixhead.ops.attention import dense

SPEC = CoreSpec(Case(1, 63, heads=4, kv_heads=4, head_dim=8), "float32", "random", 0.5)
FAST = Options(rounds=1, seconds=0.0, memory=False)


def rows_of(*entries, options=FAST):
    rows, steps = [], []
    run(list(entries), options, rows.append, lambda done, total: steps.append((done, total)))
    assert steps == [(done, len(entries)) for done in range(len(entries) + 1)]
    return rows


def test_a_right_engine_has_times_and_ratios():
    masked, gathered = rows_of(Entry(SPEC, "masked", 1), Entry(SPEC, "gathered", 2))
    assert masked.gated.wall > 0 and masked.gated.cpu > 0
    assert gathered.threads == 2 and gathered.share == 0.5
    assert gathered.wall_ms > 0 and gathered.dense.wall > 0
    assert gathered.error < 1e-5


def test_a_wrong_engine_is_not_timed(monkeypatch):
    def doubled(*args, **keywords):
        return 2 * dense.attend(*args, **keywords)

    monkeypatch.setitem(IMPLEMENTATIONS, "doubled", Engine("doubled", doubled))
    [row] = rows_of(Entry(SPEC, "doubled", 1, required=0.5))
    assert (row.status, row.reached, row.dense, row.wall_ms) == (WRONG, False, None, None)
    assert row.error == pytest.approx(1.0, rel=0.01)


def test_an_engine_that_refuses_is_skipped_with_its_sentence(monkeypatch):
    def refuse(*args, **keywords):
        raise MixheadError("This engine needs another machine.")

    monkeypatch.setitem(IMPLEMENTATIONS, "elsewhere", Engine("elsewhere", refuse))
    skipped, timed = rows_of(Entry(SPEC, "elsewhere", 1), Entry(SPEC, "dense", 1))
    assert (skipped.status, skipped.note) == (SKIPPED, "This engine needs another machine.")
    assert timed.wall_ms > 0


@pytest.mark.parametrize(("required", "reached"), [(1e-6, True), (1e6, False)])
def test_figures_are_marked_reached_or_missed(required, reached):
    rows = rows_of(Entry(SPEC, "auto", 1, required), Entry(SPEC, "auto", 1, required, required_of_gated=True))
    assert [row.reached for row in rows] == [reached, reached]
    assert met(rows) == (2 * reached, 2)


@pytest.mark.parametrize(("level", "wanted"), [("avx512_bf16", 1.7), ("avx2", 1.75)])
def test_the_figures_cover_every_share_and_direction(monkeypatch, level, wanted):
    monkeypatch.setattr(cpu, "best_level", lambda: level)
    entries = list(entries_of_figures(figures(), ["auto"], [1]))
    seen = {(e.spec.direction, e.spec.dtype, e.spec.routing, e.spec.share) for e in entries}
    assert ("decode", "float32", "random", 0.25) in seen and ("forward", "bfloat16", "random", 1.0) in seen
    assert ("forward + backward", "float32", "random", 0.75) in seen and ("forward", "float32", "skewed", 0.5) in seen
    [figure] = [e.required for e in entries if e.spec.title == "8 x 197, bidirectional" and e.spec.share == 0.5]
    assert figure == wanted


def test_a_grid_has_every_combination_and_decode_counts_cached_keys():
    cases = list(grid([1, 2], [16, 32], [False, True], ["forward", "backward", "decode"], Case(heads=4, kv_heads=2)))
    assert len(cases) == len(set(cases)) == 2 * 2 * (2 + 2 + 1)
    assert {(c.tokens, c.keys) for c in cases if c.direction == "decode"} == {(1, 16), (1, 32)}
    assert all(c.kv_heads == 2 for c in cases)
    assert {c.direction for preset in PRESETS.values() for c in preset} == {"forward", "forward + backward", "decode"}


def test_json_holds_machine_and_rows_and_no_infinity(tmp_path, monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "nan", Engine("nan", lambda *a, **k: dense.attend(*a, **k) * float("nan")))
    results = Results("mixhead bench core", 1, rows_of(Entry(SPEC, "nan", 1), Entry(SPEC, "masked", 1)))
    assert results.wrong
    file = tmp_path / "speed.json"
    file.write_text("of before")
    results.write(file)
    read = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read["versions"]["torch"] and read["cpu"] and read["date"].startswith("20") and read["rounds"] == 1
    assert [row["status"] for row in read["rows"]] == ["wrong", "ok"]
    assert read["rows"][0]["error"] is None and read["rows"][1]["dense"]["cpu"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]


def test_peak_memory_counts_what_a_run_holds_at_once():
    """The reference holds two or more N x T tensors for every head; the stock kernel little more than its output."""
    spec = CoreSpec(Case(1, 1024, heads=4, kv_heads=4, head_dim=32), "float32", "random", 0.5)
    scores_mib, output_mib = 4 * 1024 * 1024 * 4 / 2**20, 4 * 1024 * 32 * 4 / 2**20
    assert peak_memory(spec, "reference", 1) > 1.9 * scores_mib
    assert 0.5 * output_mib < peak_memory(spec, "sdpa", 1) < scores_mib


def test_a_measurement_that_fails_in_its_process_is_told():
    with pytest.raises(MixheadError, match="no engine 'magic'"):
        peak_memory(SPEC, "magic", 1)
