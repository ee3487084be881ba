"""The measured cross-over: kept per machine, looked up by `explain`, and never in the way where it is broken."""

import json
import logging
from dataclasses import replace

import pytest
import torch

from mixhead.errors import MixheadError
from mixhead.ops import cpu, crossover, explain
from mixhead.ops.crossover import Point, Table
from mixhead.routing import Routing

THREADS = torch.get_num_threads()
SQUARE = Point("float32", False, 1.0, 16, 1, 64, 64, 64, 0.8)
DECODE = Point("float32", False, 1.0, 16, 1, 64, 1, 1024, 0.9)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, with the table looked up as in a real process."""
    cpu.available()  # The kernel comes from the usual cache: compiling it again would take half a minute.
    monkeypatch.setenv("MIXHEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(crossover, "measured", MEASURED)
    crossover.load.cache_clear()
    yield tmp_path / "cache"
    crossover.load.cache_clear()


MEASURED = crossover.measured


def arguments(queries, keys=None, share=1.0, heads=16, kv_heads=16):
    q, k = torch.randn(1, heads, queries, 64), torch.randn(1, kv_heads, keys or queries, 64)
    selected = torch.arange(heads).expand(1, queries, heads) < share * heads
    return q, k, Routing(selected.float(), selected)


def test_the_largest_measured_size_inside_decides():
    table = Table((SQUARE, replace(SQUARE, queries=256, keys=256, ratio=1.2), DECODE))
    sizes = {"dtype": "float32", "causal": False, "share": 1.0, "lanes": 16, "groups": 1, "head_dim": 64}
    assert table.pays(**sizes, queries=128, keys=128) is False
    assert table.pays(**sizes, queries=256, keys=4096) is True
    assert table.pays(**sizes, queries=1, keys=4096) is False
    assert table.pays(**sizes, queries=32, keys=32) is None, "nothing as small was measured"
    assert table.pays(**{**sizes, "lanes": 8}, queries=256, keys=256) is None
    assert table.pays(**{**sizes, "causal": True}, queries=256, keys=256) is None
    assert table.pays(**{**sizes, "head_dim": 128, "lanes": 512, "groups": 4}, queries=256, keys=256) is True


def test_few_queries_say_nothing_about_many():
    """A step of decoding against a long cache may be more work than a short prompt, and runs through other code."""
    short, long_cache = replace(SQUARE, ratio=1.5), replace(DECODE, queries=4, keys=4096, ratio=0.5)
    table = Table((short, long_cache))
    sizes = {"dtype": "float32", "causal": False, "share": 1.0, "lanes": 16, "groups": 1, "head_dim": 64}
    assert table.pays(**sizes, queries=4096, keys=4096) is True
    assert table.pays(**sizes, queries=32, keys=4096) is False


def test_in_doubt_dense_attention_is_taken():
    assert not replace(SQUARE, ratio=1.01).pays
    assert replace(SQUARE, ratio=1.05).pays


def test_fewer_active_heads_are_looked_up_where_all_heads_do_not_pay(cache):
    crossover.store([DECODE, replace(DECODE, share=0.5, ratio=1.6)], THREADS)
    for share, pays in ((1.0, False), (0.75, False), (0.5, True), (0.25, True)):
        q, k, routing = arguments(1, 1500, share)
        assert crossover.measured(q, k, routing.selected_BNH, causal=True) is pays, share


def test_explain_says_what_was_measured_and_what_is_a_default(cache):
    if not cpu.available()[0] or cpu.best_level() not in cpu.LEVELS[torch.float32]:
        pytest.skip("the kernel is no default on this machine")
    q, k, routing = arguments(128)
    assert explain(q, k, routing).impl == "cpu" and "default" in explain(q, k, routing).reason
    crossover.store([SQUARE], THREADS)
    assert explain(q, k, routing).impl == "dense" and "measured on this machine" in explain(q, k, routing).reason
    crossover.store([replace(SQUARE, ratio=1.5)], THREADS)
    assert explain(q, k, routing).impl == "cpu" and "measured on this machine" in explain(q, k, routing).reason
    assert "default" in explain(*arguments(32)).reason, "smaller than anything measured"


def test_a_table_is_read_once_and_belongs_to_a_number_of_threads(cache):
    file = crossover.store([SQUARE], THREADS)
    assert crossover.load(THREADS).points == (SQUARE,)
    file.unlink()
    assert crossover.load(THREADS) is not None
    assert crossover.load(THREADS + 1) is None
    assert crossover.table_file(THREADS) != crossover.table_file(THREADS + 1)


def test_another_kernel_has_another_table(cache, tmp_path, monkeypatch):
    before = crossover.table_file(THREADS)
    (tmp_path / "attend.cpp").write_text("// changed")
    monkeypatch.setattr(crossover.compiling, "SOURCES", tmp_path)
    crossover.sources_checksum.cache_clear()
    changed = crossover.table_file(THREADS)
    crossover.sources_checksum.cache_clear()
    assert changed != before


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"points": [1]}', '{"points": [{"dtype": "float32"}]}', "half", "wrong type"],
)
def test_a_broken_table_is_told_once_and_the_defaults_hold(cache, caplog, content):
    file = crossover.store([SQUARE], THREADS)
    whole = file.read_text()
    if content == "wrong type":
        content = json.dumps({"points": [{**json.loads(whole)["points"][0], "queries": "64"}]})
    file.write_text(whole[: len(whole) // 2] if content == "half" else content)
    crossover.load.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert crossover.load(THREADS) is None
        assert crossover.load(THREADS) is None
    assert caplog.text.count("doctor --tune") == 1


def test_an_unwritable_cache_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MIXHEAD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(MixheadError, match="MIXHEAD_CACHE"):
        crossover.store([SQUARE], THREADS)


def test_nothing_but_the_table_is_left_in_the_cache(cache):
    crossover.store([SQUARE], THREADS)
    file = crossover.store([DECODE], THREADS)
    assert list(cache.iterdir()) == [file]
    assert crossover.load(THREADS).points == (DECODE,)
