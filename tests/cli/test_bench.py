"""`mixhead bench` and `mixhead doctor --tune`, at sizes of milliseconds."""

import json

import pytest
import torch

from mixhead.cli import bench
from mixhead.cli.app import run
from mixhead.ops import IMPLEMENTATIONS, Engine, cpu, crossover
from mixhead.ops.attention import dense
from mixhead.ops.crossover import store

FAST = ["--rounds", "1", "--seconds", "0", "--no-memory"]
SMALL = ["--tokens", "33", "--heads", "4", "--head-dim", "8", *FAST]
LLAMA = "llama:layers=1,hidden=16,heads=4,kv=2,intermediate=8,vocab=20"


def measured(arguments, tmp_path):
    file = tmp_path / "speed.json"
    code = run(["bench", *arguments, "--json", str(file)])
    return code, json.loads(file.read_text())["rows"] if file.exists() else []


def test_core_measures_every_combination_and_draws_it(tmp_path, capsys):
    plot = tmp_path / "speed.png"
    options = ["--direction", "forward,backward,decode", "--share", "1 0.5", "--engine", "masked,gathered"]
    table = tmp_path / "speed.md"
    options += ["--plot", str(plot), "--markdown", str(table)]
    code, rows = measured(["core", *SMALL, *options, "--threads", "1,2"], tmp_path)
    assert code == 0
    assert len(rows) == 3 * 2 * 2 * 2 and all(row["status"] == "ok" for row in rows)
    assert {row["threads"] for row in rows} == {1, 2}
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "| forward, 1 x 33, bidirectional, 4 heads of 8 | float32 | 1 | masked |" in table.read_text()
    assert "gathered" in capsys.readouterr().out


def test_without_a_choice_every_engine_is_measured(tmp_path):
    code, rows = measured(["module", *SMALL, "--share", "0.5"], tmp_path)
    assert code == 0
    assert [row["engine"] for row in rows] == ["masked", "auto", *(e for e in IMPLEMENTATIONS if e != "reference")]
    assert all(row["subject"] == "module" for row in rows)


def test_a_model_is_measured_in_all_directions(tmp_path):
    options = ["--active-heads", "2", "--direction", "forward,backward,decode", "--tokens", "20", *FAST]
    code, rows = measured(["model", LLAMA, *options], tmp_path)
    assert code == 0
    assert [(row["direction"], row["engine"]) for row in rows] == [
        (direction, engine)
        for direction in ("prefill", "forward + backward", "decode")
        for engine in ("masked", "auto")
    ]
    assert {row["share"] for row in rows} == {0.5}


def test_a_preset_and_a_figure_by_their_description(tmp_path, capsys):
    code, rows = measured(["core", "--preset", "small", "--only", "1 x 16, causal", "--share", "0.5", *FAST], tmp_path)
    assert code == 0 and {row["case"] for row in rows} == {"1 x 16, causal"}
    code, rows = measured(["core", "--preset", "figures", "--only", "1 x 16, causal", *FAST], tmp_path)
    assert code == 0 and {row["required"] for row in rows} == {0.98}
    assert f"of {len(rows)} figures are reached" in capsys.readouterr().out


def test_a_wrong_result_ends_with_1_and_without_a_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(IMPLEMENTATIONS, "doubled", Engine("doubled", lambda *a, **k: 2 * dense.attend(*a, **k)))
    code, rows = measured(["core", *SMALL, "--share", "0.5", "--engine", "doubled,masked"], tmp_path)
    assert code == 1
    assert [(row["status"], row["wall_ms"] is None) for row in rows] == [("wrong", True), ("ok", False)]
    assert "wrong" in capsys.readouterr().out


def test_ctrl_c_leaves_the_rows_that_are_done(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setitem(IMPLEMENTATIONS, "interrupted", Engine("interrupted", interrupt))
    code, rows = measured(["core", *SMALL, "--share", "0.5", "--engine", "masked,interrupted,dense"], tmp_path)
    assert code == 130
    assert [row["engine"] for row in rows] == ["masked"]
    assert "Interrupted after 1 of 3 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["core", "--preset", "huge"], "huge"),
        (["core", "--preset", "quick", "--only", "nonsense"], "nonsense"),
        (["core", "--share", "1.5"], "share"),
        (["core", "--tokens", "0"], "whole number"),
        (["core", "--direction", "sideways"], "sideways"),
        (["core", "--mask", "diagonal"], "diagonal"),
        (["core", "--dtype", "float8"], "float8"),
        (["core", "--engine", "masked,foo"], "There is no engine 'foo'"),
        (["core", "--plot", "speed.xyz"], "ends in .xyz"),
        (["core", "--plot", "nowhere/speed.png"], "there is no folder nowhere"),
        (["core", "--heads", "6", "--kv-heads", "4"], "kv_heads divides heads"),
        (["core", "--tokens", "8", "--routing", "nowhere.safetensors"], "nowhere.safetensors"),
        (["model", "nowhere"], "nowhere"),
        (["model", "llama:layers=none"], "whole number"),
        (["record", LLAMA, "out.safetensors"], "model folder"),
    ],
)
def test_mistakes_end_in_a_sentence(arguments, word, capsys):
    assert run(["bench", *arguments, *([] if arguments[0] == "record" else FAST)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert word in error and "Traceback" not in error


def test_doctor_tune_measures_keeps_and_uses(tmp_path, monkeypatch, capsys):
    if not cpu.available()[0]:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setenv("MIXHEAD_CACHE", str(tmp_path))
    monkeypatch.delenv("MIXHEAD_CROSSOVER")
    first = next(store.races({"attention": True}, thorough=False))
    monkeypatch.setattr(store, "races", lambda built, thorough: iter([first]))
    crossover.forget()
    try:
        assert run(["doctor", "--tune"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        [file] = tmp_path.glob("crossover-*-everything-*.json")
        kept = json.loads(file.read_text())
        assert f"Kept {len(kept['points'])} measured points" in said and "measured at length" in said
        assert kept["machine"]["threads"] == torch.get_num_threads()
        assert crossover.table("attention", torch.get_num_threads()).origin == "measured at length on this machine"
    finally:
        crossover.forget()


def test_lists_are_written_with_commas_or_spaces():
    assert bench.many("1, 2 3", bench.positive) == [1, 2, 3]
    assert bench.many("", str) == []
