"""Which engine is fast is measured once per processor, kept, looked up in every call, and never in the way."""

import json
import logging
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch

from mixhead.errors import MixheadError
from mixhead.ops import cpu, crossover, explain, head_attention
from mixhead.ops.cpu import compiling
from mixhead.ops.crossover import Point, Table, race, rulings, store
from mixhead.ops.crossover.race import Effort, Race
from mixhead.ops.crossover.table import kind_of, neighbours
from mixhead.routing import Routing

POINT = Point("attention", "cpu", "float32", 64, 64, 1.0, 1.5, 1.5)
QUICK = Effort(rounds=1, seconds=0.0, budget_s=60.0, thorough=False)


def table_of(*points):
    return Table(points, {"cpu": "a processor", "instruction_set": "avx2", "threads": 1}, "2026-12-01", "measured")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, a process that knows of no table, and measurements that take no time and are counted."""
    cpu.available()  # The kernel comes from the usual cache: compiling it again would take half a minute.
    monkeypatch.delenv("MIXHEAD_CROSSOVER")
    monkeypatch.setenv("MIXHEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(store, "measure", counted(store.measure))
    monkeypatch.setattr(store, "races", lambda built, thorough: iter([]))
    crossover.forget()
    yield tmp_path / "cache"
    crossover.forget()


def counted(measure):
    def count(*args, **kwargs):
        count.calls += 1
        return measure(*args, **kwargs)

    count.calls = 0
    return count


def arguments(queries, keys=None, share=1.0, heads=8, head_dim=64, dtype=torch.float32):
    q, k = (torch.randn(1, heads, n, head_dim, dtype=dtype) for n in (queries, keys or queries))
    selected = torch.arange(heads).expand(1, queries, heads) < share * heads
    return q, k, Routing(selected.to(dtype), selected)


# --- the table --------------------------------------------------------------------------------------------------------


def test_between_measured_sizes_both_neighbours_must_have_won():
    table = table_of(*(replace(POINT, size=size, ratio=ratio) for size, ratio in ((16, 1.5), (64, 0.9), (256, 1.5))))
    look = partial(table.verdict, "attention", "cpu", "float32", 64)
    assert [look(size).share for size in (16, 20, 64, 100, 256, 10_000)] == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert look(8).share == 0.0, "nothing as small was measured"
    assert look(100).decisive.size == 64


def test_between_measured_widths_too():
    table = table_of(*(replace(POINT, width=width, ratio=ratio) for width, ratio in ((8, 0.7), (32, 1.5), (64, 1.5))))
    shares = [table.verdict("attention", "cpu", "float32", width, 64).share for width in (4, 8, 16, 32, 48, 256)]
    assert shares == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


def test_the_largest_share_that_won_holds_for_all_smaller_ones():
    table = table_of(
        *(replace(POINT, share=share, ratio=ratio) for share, ratio in ((1.0, 0.8), (0.75, 1.1), (0.5, 1.6)))
    )
    assert table.verdict("attention", "cpu", "float32", 64, 64).share == 0.75


def test_a_compiled_graph_is_judged_without_gates_and_for_all_its_sizes():
    small, large = replace(POINT, size=1, ratio=2.0, bare=0.5), replace(POINT, size=256, bare=1.2)
    table = table_of(small, large)
    assert table.verdict("attention", "cpu", "float32", 64, 1, fused=True).share == 0.0
    assert table.verdict("attention", "cpu", "float32", 64, None, fused=True).share == 1.0
    slower = table_of(large, replace(large, width=8, bare=0.9))
    assert slower.verdict("attention", "cpu", "float32", None, None, fused=True).share == 0.0


def test_what_was_not_measured_is_not_taken():
    assert table_of(POINT).verdict("attention", "cpu", "bfloat16", 64, 64).share == 0.0
    assert table_of().verdict("glu", "cpu", "float32", 64, 64).share == 0.0
    assert neighbours([16, 64], 8) == set()


def test_in_doubt_dense_attention_is_taken():
    assert table_of(replace(POINT, ratio=1.01)).verdict("attention", "cpu", "float32", 64, 64).share == 0.0


def test_a_table_is_what_was_written():
    table = table_of(POINT, replace(POINT, kind=kind_of("bfloat16", causal=True, gradient=True)))
    again = Table.from_json(table.to_json(), "read")
    assert (again.points, again.machine, again.date, again.left_out) == (table.points, table.machine, table.date, 0)


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """Puts a table in the place of what was measured here."""

    def use(*points):
        table = table_of(*points)
        monkeypatch.setattr(crossover, "table", lambda operator, threads: table)
        monkeypatch.setattr(rulings, "table", lambda operator, threads: table)

    return use


needs_kernel = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])


@needs_kernel
def test_explain_says_what_was_measured_where_and_when(measured):
    measured(replace(POINT, ratio=1.36))
    choice = explain(*arguments(64))
    assert choice.impl == "cpu"
    assert choice.reason == (
        "the C++ kernel ran at 1.36 times the speed of the stock kernel on all heads (float32, 64 tokens, width 64, "
        "100% of the heads; measured 2026-12-01, a processor, avx2, 1 thread)"
    )
    measured(replace(POINT, ratio=0.81))
    choice = explain(*arguments(64))
    assert choice.impl == "dense" and "ran at 0.81 of the speed of the stock kernel" in choice.reason
    measured()
    assert "was not measured for this (float32;" in explain(*arguments(64)).reason


@needs_kernel
def test_heads_are_counted_where_that_decides(measured):
    measured(replace(POINT, ratio=0.9), replace(POINT, share=0.5, ratio=1.4))
    assert [explain(*arguments(64, share=share)).impl for share in (1.0, 0.75, 0.5, 0.25)] == ["dense"] * 2 + [
        "cpu"
    ] * 2
    q, k, routing = arguments(64, share=1.0)
    promised = replace(routing, heads_per_group=4)
    assert explain(q, k, promised).impl == "cpu", "a promise is believed"
    measured(*(replace(POINT, size=1, share=share, ratio=ratio) for share, ratio in ((1.0, 0.9), (0.5, 1.4))))
    assert explain(*arguments(9, share=0.5)).impl == "dense", "to count takes longer than it saves"


@needs_kernel
@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("float32 causal", {"causal": True}),
        ("float32 masked", {"attn_mask": torch.ones(1, 1, 64, 64, dtype=torch.bool)}),
        ("float32 masked", {"attn_mask": torch.ones(1, 1, 64, 64, dtype=torch.bool), "causal": True}),
        ("float32 gradient", {}),
        ("float32 cache", {"keys": 256}),
    ],
)
def test_each_kind_of_call_has_its_own_measurement(measured, kind, call):
    measured(replace(POINT, kind=kind, size=1))
    keys = call.pop("keys", None)
    q, k, routing = arguments(1 if keys else 64, keys)
    assert explain(q.requires_grad_("gradient" in kind), k, routing, **call).impl == "cpu"
    measured(POINT)
    assert explain(q, k, routing, **call).impl == "dense"


@needs_kernel
def test_what_explain_says_is_what_runs(measured):
    q, k, routing = arguments(64, share=0.5)
    for ratio in (0.8, 1.5):
        measured(replace(POINT, ratio=ratio))
        by_name = head_attention(q, k, k, routing, impl=explain(q, k, routing).impl)
        assert torch.equal(head_attention(q, k, k, routing), by_name)


# --- measuring --------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that calls move on, so that nothing depends on how busy the machine is."""

    def __init__(self):
        self.now = 0.0

    def call(self, seconds):
        self.now += seconds


@pytest.fixture
def racing(monkeypatch):
    """Makes a race of calls that take so many seconds, ours by share."""
    clock = Clock()
    monkeypatch.setattr(race, "clock_for", lambda threads: lambda: clock.now)

    def make(ours, dense, shares=(1.0, 0.5), **kwargs):
        def runs(share):
            yield tuple(partial(clock.call, seconds) for seconds in (ours[share], dense, dense / 2))

        return Race("attention", "cpu", "float32", 64, 64, shares, runs, **kwargs)

    return make


def test_a_race_ends_where_the_engine_wins(racing):
    [first, second] = race.run_race(racing({1.0: 12, 0.5: 4}, 10), QUICK)
    assert first.ratio < 1 < second.ratio and second.share == 0.5
    assert (first.ratio, second.ratio, second.bare) == (0.833, 2.5, 1.25)
    assert [p.share for p in race.run_race(racing({1.0: 4}, 10), QUICK)] == [1.0]


def test_a_share_that_cannot_win_is_left_out(racing):
    shares = [p.share for p in race.run_race(racing({1.0: 20, 0.25: 1}, 8, (1.0, 0.75, 0.25)), QUICK)]
    assert shares == [1.0, 0.25]


def test_what_a_preferred_engine_wins_is_not_measured(racing):
    first, other = racing({1.0: 1}, 10), replace(racing({1.0: 1}, 10, unless_won_by="cpu"), engine="slots")
    points, _ = race.run_races(lambda: [first, other], QUICK, lambda done, total: None)
    assert [p.engine for p in points] == ["cpu"]


def test_there_is_a_limit_to_the_time(racing):
    steps = []
    points, left_out = race.run_races(
        lambda: [racing({1.0: 1}, 10)] * 3, replace(QUICK, budget_s=-1.0), lambda *step: steps.append(step)
    )
    assert (points, left_out) == ([], 3) and steps[0] == (0, 3) and steps[-1] == (3, 3)


@needs_kernel
def test_the_real_races_run_whatever_the_caller_has_switched_on():
    """One of each operator and direction, in inference mode, under autocast, with another default device and dtype."""
    cpu.build()
    firsts = {}
    for one in store.races(dict.fromkeys(store.LIBRARIES.values(), True), thorough=False):
        firsts.setdefault((one.operator, one.engine, "gradient" in one.kind), one)
    assert {operator for operator, _, _ in firsts} == {
        "attention", "projection", "slot projection", "aggregated attention", "glu",
    }  # fmt: skip
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            races = [replace(one, shares=one.shares[-1:], unless_won_by=None) for one in firsts.values()]
            points, left_out = race.run_races(lambda: races, QUICK, lambda done, total: None)
    finally:
        torch.set_default_dtype(torch.float32)
    assert left_out == 0 and len(points) == len(firsts)
    assert all(point.ratio > 0 for point in points)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are as they were"


def test_the_plan_covers_what_is_chosen():
    plan = list(store.races(dict.fromkeys(store.LIBRARIES.values(), True), thorough=False))
    keys = [(one.operator, one.engine, one.kind, one.width, one.size) for one in plan]
    assert len(keys) == len(set(keys))
    kinds = {one.kind for one in plan if one.operator == "attention" and one.engine == "cpu"}
    for dtype in ("float32", "bfloat16"):
        for gradient in (False, True):
            for mask in ({}, {"causal": True}, {"masked": True}):
                assert kind_of(dtype, **mask, gradient=gradient) in kinds
        assert {kind_of(dtype, cache=True), kind_of(dtype, masked=True, cache=True)} <= kinds
    assert {one.width for one in plan if one.operator == "attention"} == {8, 32, 64, 128}
    portable = [one.engine for one in store.races(dict.fromkeys(store.LIBRARIES.values(), False), thorough=False)]
    assert set(portable) == {"slots", "gathered"}, "without a kernel nothing of it is measured"


# --- keeping ----------------------------------------------------------------------------------------------------------


def test_it_is_measured_once_and_kept(cache, caplog):
    with caplog.at_level(logging.WARNING):
        first = crossover.table("attention", 1)
        assert crossover.table("attention", 1) is first
    crossover.forget()
    again = crossover.table("attention", 1)
    assert store.measure.calls == 1 and again.machine == first.machine
    assert caplog.text.count("Measuring which engines are fast") == 1
    assert sorted(file.suffix for file in cache.iterdir()) == [".json", ".lock"], "nothing else is left"


def test_processes_and_threads_at_once_measure_once(cache):
    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(partial(crossover.table, "attention"), [1] * 8))
    assert store.measure.calls == 1 and all(table.date == tables[0].date for table in tables)


def test_where_nothing_can_be_written_it_is_measured_once_in_memory(cache, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MIXHEAD_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        assert crossover.table("attention", 2) is crossover.table("attention", 4)
    assert store.measure.calls == 1
    assert caplog.text.count("measured for this process alone") == 1
    with pytest.raises(MixheadError, match="MIXHEAD_CACHE"):
        crossover.measure_at_length(lambda done, total: None)


def test_another_number_of_threads_takes_the_nearest_table(cache):
    four = crossover.table("attention", 4)
    assert crossover.table("attention", 3).machine == crossover.table("attention", 16).machine == four.machine
    assert store.measure.calls == 1
    crossover.table("attention", 1)
    assert store.measure.calls == 2, "one thread is another thing than several"


@pytest.mark.parametrize("what", ["cpu_model", "sources_checksum"])
def test_another_processor_or_kernel_has_another_table(cache, monkeypatch, what):
    crossover.table("attention", 1)
    crossover.forget()
    monkeypatch.setattr(store, what, lambda: "another")
    crossover.table("attention", 1)
    assert store.measure.calls == 2 and len(list(cache.glob("*.json"))) == 2


def test_an_interrupted_measurement_leaves_nothing_and_is_made_anew(cache, monkeypatch):
    measure = store.measure

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        crossover.table("attention", 1)
    assert not list(cache.glob("*.json"))
    monkeypatch.setattr(store, "measure", measure)
    crossover.table("attention", 1)
    assert measure.calls == 1


def test_a_measurement_on_a_busy_machine_serves_its_process_alone(cache, monkeypatch, caplog):
    measure = store.measure
    monkeypatch.setattr(store, "measure", lambda *args: replace(measure(*args), left_out=100))
    with caplog.at_level(logging.WARNING):
        assert crossover.table("attention", 2) is crossover.table("attention", 2)
    assert "the next process measures again; `mixhead doctor --tune`" in caplog.text
    assert not list(cache.glob("*.json"))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "half", "wrong type"])
def test_a_broken_table_is_told_and_measured_anew(cache, caplog, content):
    crossover.table("attention", 1)
    [file] = cache.glob("*.json")
    whole = table_of(POINT).to_json()
    wrong = json.dumps({**json.loads(whole), "points": [["attention", "cpu", "float32", "64", 64, 1.0, 1.5, 1.5]]})
    file.write_text({"half": whole[: len(whole) // 2], "wrong type": wrong}.get(content, content))
    crossover.forget()
    with caplog.at_level(logging.WARNING):
        crossover.table("attention", 1)
    assert "cannot be read" in caplog.text and store.measure.calls == 2


def test_a_long_measurement_wins_over_a_short_one_and_a_shipped_one_over_it(cache, tmp_path):
    assert crossover.table("attention", 1).origin == "measured on this machine"
    (tmp_path / "shipped").mkdir()
    name = f"{store.slug(store.cpu_model())}-{cpu.best_level()}-1.json"
    (tmp_path / "shipped" / name).write_text(table_of(POINT).to_json())
    crossover.forget()
    assert crossover.table("attention", 1).origin.startswith("shipped")
    threads = torch.get_num_threads()
    _, file = crossover.measure_at_length(lambda done, total: None)
    assert crossover.table("attention", threads).origin == "measured at length on this machine" and file.exists()


def test_what_a_long_measurement_did_not_come_to_is_measured_shortly():
    training = replace(POINT, kind="float32 gradient")
    long = replace(table_of(replace(POINT, ratio=2.0)), left_out=3)
    assert store.completed(long, lambda: table_of(POINT, training)).points == (*long.points, training)
    assert store.completed(replace(long, left_out=0), lambda: pytest.fail("not needed")).points == long.points


def test_a_table_that_is_named_is_the_only_one(cache, tmp_path, monkeypatch):
    file = tmp_path / "named.json"
    monkeypatch.setenv("MIXHEAD_CROSSOVER", str(file))
    with pytest.raises(MixheadError, match=r"MIXHEAD_CROSSOVER names .*named.json.*doctor --tune"):
        crossover.table("attention", 1)
    file.write_text(table_of(POINT).to_json())
    assert crossover.table("attention", 1).points == (POINT,)
    assert store.measure.calls == 0


def test_shipped_tables_can_be_read_and_say_where_they_come_from():
    for file in store.SHIPPED.glob("*.json"):
        table = Table.from_json(file.read_text(), "shipped")
        assert table.points and table.left_out == 0
        name = f"{store.slug(table.machine['cpu'])}-{table.machine['instruction_set']}-{table.machine['threads']}.json"
        assert file.name == name


@needs_kernel
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_process_that_is_killed_while_it_measures_leaves_nothing(tmp_path):
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which `&` of a shell ignores
        "from mixhead.ops.crossover import store; store.SHIPPED /= 'none'; store.table('attention', 1)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MIXHEAD_CROSSOVER"}
    cache = tmp_path / "cache"
    cache.mkdir()
    kernels = compiling.cache_directory() / "kernels"
    (cache / "kernels").symlink_to(kernels)
    environment["MIXHEAD_CACHE"] = str(cache)
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
    assert "Measuring" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0 and not list(cache.glob("crossover*.json"))
