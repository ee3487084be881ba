"""A tuning from end to end: killed, stopped, continued; its log, its refusals, its kinds."""

import csv
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from small_runs import SMALL, STEP, VOCABULARY, assert_same, converted, original, rows, windows
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mixhead import MixheadError
from mixhead.models.hugging_face import MoHModelMixin
from mixhead.tasks.language_modelling import trainer
from mixhead.tasks.language_modelling.train import tune
from mixhead.training import checkpoints
from mixhead.training.lock import only_run_in
from mixhead.training.progress import StepLog, read_rows


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune") / "whole"
    model = converted()
    return tune(model, windows(), SMALL, folder, progress=False), folder


def test_log_and_result(whole_run):
    result, folder = whole_run
    log = read_rows(result.log)
    with result.log.open(newline="") as file:
        columns = ",".join(next(csv.reader(file)))
    assert columns == (
        "step,tokens,loss,cross_entropy,distillation,balance,smallest_load,largest_load,load_entropy,load_entropy_0,"
        "load_entropy_1,gradient_norm,learning_rate,tokens_per_second,seconds"
    )
    assert [int(row["step"]) for row in log] == list(range(1, 9)) and result.steps == 8
    assert int(log[-1]["tokens"]) == result.tokens == 8 * STEP
    for row in log:
        values = {name: float(value) for name, value in row.items() if value}
        assert values["loss"] == pytest.approx(values["cross_entropy"] + 0.5 * values["balance"], rel=1e-5)
        assert (
            0 <= values["smallest_load"] <= 1 / 3 <= values["largest_load"] <= 1
            and 0 <= values["load_entropy"] <= 1.0001
        )
        assert values["tokens_per_second"] > 0 and row["distillation"] == ""
    rates = [float(row["learning_rate"]) for row in log]
    assert max(rates) == pytest.approx(1e-2) and rates[-1] == pytest.approx(5e-6) and rates[0] < rates[1]
    assert sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name != "tensorboard") == [
        "checkpoint-6",
        "checkpoint-8",
        "model",
    ]
    assert not list(folder.rglob("*.partial")) and not list(folder.rglob("training_args.bin"))
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["seed"] == 0
    loaded = AutoModelForCausalLM.from_pretrained(result.folder)
    assert_same(loaded.state_dict(), result.model.state_dict(), rtol=0, atol=0)


def test_tensorboard_has_the_same_numbers(whole_run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result, folder = whole_run
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    expected = [pytest.approx(float(row["balance"]), rel=1e-5) for row in read_rows(result.log)]
    assert [event.value for event in events.Scalars("train/balance")] == expected


def test_without_tensorboard_there_is_the_csv(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = StepLog(tmp_path / "log.csv", ("step", "seconds"), 0)
    log.write({"step": 1, "seconds": 0.5})
    log.close()
    assert read_rows(tmp_path / "log.csv") == [{"step": "1", "seconds": "0.5"}]


def test_the_order_of_the_windows_depends_on_seed_and_step_alone():
    ids = windows(5)
    order = trainer.WindowOrder(ids, 13, seed=3)
    straight = torch.stack([order[i] for i in range(13)])
    again = trainer.WindowOrder(ids, 13, seed=3)
    assert all(torch.equal(again[i], straight[i]) for i in (12, 0, 7, 3))
    assert straight[:5].sort(0).values.equal(ids.sort(0).values) and not straight[:5].equal(straight[5:10])


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(2)
sys.path[:0] = [{tests!r}]
import small_runs as t
from mixhead.tasks.language_modelling.train import tune
from mixhead.training import progress
write, save = progress.StepLog.write, torch.save
def write_another_half(self, row):
    write(self, row)
    if row["step"] == {step}:
        self._file.write("7,336,halfwr")
        self._file.flush()
def save_and_die(state, path, *args, **kwargs):
    save(state, path, *args, **kwargs)
    if "checkpoint-{step}/" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
progress.StepLog.write, torch.save = write_another_half, save_and_die
tune(t.converted(), t.windows(), t.SMALL, {folder!r}, resume=True, progress=False)
"""


def test_a_killed_run_continues_with_the_same_losses(whole_run, tmp_path):
    """Killed in the middle of a checkpoint, with half a row in the log: nothing is lost and no row appears twice."""
    result, folder = whole_run
    run = tmp_path / "run"
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(run), step=6)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.name for p in checkpoints.checkpoints(run)] == ["checkpoint-3"] and list(run.glob(".*.partial"))
    assert len(read_rows(run / "log.csv")) == 6
    resumed = tune(converted(), windows(), SMALL, run, resume=True, progress=False)
    assert resumed.resumed_from == 3 and not list(run.glob(".*.partial"))
    assert rows(run) == rows(folder)
    assert_same(
        load_file(resumed.folder / "model.safetensors"), load_file(result.folder / "model.safetensors"), rtol=0, atol=0
    )


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_continue(whole_run, tmp_path, monkeypatch):
    _, folder = whole_run
    before = signal.getsignal(signal.SIGINT)
    write = StepLog.write

    def interrupt(self, row):
        write(self, row)
        if row["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(StepLog, "write", interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"after step 2 of 8.*resume=True"):
        tune(converted(), windows(), SMALL, tmp_path / "run", progress=False)
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert tune(converted(), windows(), SMALL, tmp_path / "run", resume=True, progress=False).resumed_from == 2
    assert rows(tmp_path / "run") == rows(folder)


def test_a_finished_run_can_be_asked_for_again(whole_run):
    result, folder = whole_run
    again = tune(converted(), windows(), SMALL, folder, resume=True, progress=False)
    assert again.resumed_from == again.steps == 8 and again.loss == result.loss
    assert_same(again.model.state_dict(), result.model.state_dict(), rtol=0, atol=0)


# What version 0.1.0 wrote for SMALL before `recipe.yaml`, but for the paths.
TUNE_JSON = {
    "config": {
        "tokens": 384, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 0.01, "final_learning_rate": 5e-06,
        "schedule": "cosine", "router_learning_rate_factor": 1.0, "warmup": 0.2, "weight_decay": 0.01,
        "max_grad_norm": 1.0, "bf16": False, "gradient_checkpointing": False, "distillation_weight": 0.0,
        "distillation_temperature": 1.0, "lora_rank": 0, "balance_coefficient": None, "seed": 0, "save_every": 3,
        "keep_checkpoints": 2,
    },
    "model": "MoHLlamaForCausalLM", "parameters": 6040, "windows": [9, 12],
    "windows_sha256": "62bf2d565fd04fb32246975354a652ee9ffe86e309ad40ff8974d3cb0f1ca499", "processes": 1,
}  # fmt: skip


def test_a_run_of_an_earlier_version_goes_on(whole_run, tmp_path):
    _, folder = whole_run
    (tmp_path / "tune.json").write_text(json.dumps(TUNE_JSON))
    shutil.copy(folder / "log.csv", tmp_path / "log.csv")
    shutil.copytree(folder / "checkpoint-6", tmp_path / "checkpoint-6")
    with pytest.raises(MixheadError, match="seed was 0 and is 1"):
        tune(converted(), windows(), replace(SMALL, seed=1), tmp_path, resume=True, progress=False)
    assert tune(converted(), windows(), SMALL, tmp_path, resume=True, progress=False).resumed_from == 6
    assert rows(tmp_path) == rows(folder)
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["tokens"] == 384


def test_a_run_is_not_overwritten_or_continued_as_another(whole_run):
    _, folder = whole_run
    with pytest.raises(MixheadError, match="holds a run already"):
        tune(converted(), windows(), SMALL, folder, progress=False)
    with pytest.raises(MixheadError, match=r"learning_rate was 0.01 and is 0.02"):
        tune(converted(), windows(), replace(SMALL, learning_rate=2e-2), folder, resume=True, progress=False)
    with pytest.raises(MixheadError, match="windows_sha256"):
        tune(converted(), windows(seed=9), SMALL, folder, resume=True, progress=False)


def test_a_folder_in_use_is_refused(tmp_path):
    with only_run_in(tmp_path / "run"), pytest.raises(MixheadError, match="is in use by another run"):
        tune(converted(), windows(), SMALL, tmp_path / "run", resume=True, progress=False)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_named(tmp_path, name):
    config = replace(SMALL, tokens=2 * STEP)
    tune(converted(), windows(), config, tmp_path / "run", progress=False)
    file = tmp_path / "run" / "checkpoint-2" / name
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(MixheadError, match="checkpoint-2 is damaged"):
        tune(converted(), windows(), config, tmp_path / "run", resume=True, progress=False)


def test_nan_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    model = converted()
    finish = trainer.TuneTrainer.finish_step

    def poison(self):
        if self.state.global_step == 4:
            self._parts[0] = math.nan
        return finish(self)

    monkeypatch.setattr(trainer.TuneTrainer, "finish_step", poison)
    with pytest.raises(MixheadError, match=r"loss became nan at step 5.*checkpoint-3 is complete"):
        tune(model, windows(), SMALL, tmp_path / "run", progress=False)
    assert all(p.isfinite().all() for p in model.parameters())
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-3"]


def test_nan_in_the_weights_is_found_at_the_first_step(tmp_path):
    model = converted()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(MixheadError, match=r"nan at step 1.*No checkpoint was written yet"):
        tune(model, windows(), SMALL, tmp_path / "run", progress=False)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    save = torch.save

    def full(state, path, *args, **kwargs):
        if "checkpoint-6" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(MixheadError, match=r"step 6 cannot be written.*No space left.*checkpoint-3 is complete"):
        tune(converted(), windows(), SMALL, tmp_path / "run", progress=False)
    assert not list((tmp_path / "run").glob(".*.partial"))
    monkeypatch.undo()
    assert tune(converted(), windows(), SMALL, tmp_path / "run", resume=True, progress=False).resumed_from == 3


# Kinds of runs


def test_distillation_under_accumulation_is_that_of_the_whole_batch(tmp_path):
    teacher = original(seed=3)
    config = replace(SMALL, tokens=STEP, distillation_weight=0.7, distillation_temperature=2.0, warmup=0.0)
    tune(original(), windows(4), config, tmp_path / "cut", teacher, progress=False)
    tune(
        original(),
        windows(4),
        replace(config, batch_size=4, gradient_accumulation=1),
        tmp_path / "whole",
        teacher,
        progress=False,
    )
    for one, other in zip(rows(tmp_path / "cut"), rows(tmp_path / "whole"), strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)
        assert float(one["gradient_norm"]) == pytest.approx(float(other["gradient_norm"]), rel=1e-4)
    ids = windows(4)
    logits, taught = original()(input_ids=ids).logits, teacher(input_ids=ids).logits
    student, taught = logits[:, :-1], (taught[:, :-1] / 2.0).softmax(-1)
    cross_entropy = F.cross_entropy(student.transpose(1, 2), ids[:, 1:])
    divergence = 4.0 * F.kl_div((student / 2.0).log_softmax(-1), taught, reduction="none").sum(-1).mean()
    expected = 0.3 * cross_entropy + 0.7 * divergence
    assert float(rows(tmp_path / "cut")[0]["loss"]) == pytest.approx(expected.item(), rel=1e-5)
    assert teacher.lm_head.weight.grad is None


def test_the_original_is_tuned_by_the_same_call(tmp_path):
    result = tune(original(), windows(), replace(SMALL, balance_coefficient=0.1), tmp_path / "run", progress=False)
    log = read_rows(result.log)
    assert type(result.model) is LlamaForCausalLM and all(row["balance"] == "" == row["smallest_load"] for row in log)
    assert float(log[-1]["loss"]) < float(log[0]["loss"])


def test_gradient_checkpointing_and_bf16_train_alike(tmp_path):
    config = replace(SMALL, tokens=2 * STEP)
    for name, changes in {
        "plain": {},
        "checkpointing": {"gradient_checkpointing": True},
        "bf16": {"precision": "bfloat16"},
    }.items():
        model = converted()
        tune(model, windows(), replace(config, **changes), tmp_path / name, progress=False)
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    columns = ("loss", "balance", "gradient_norm")
    assert rows(tmp_path / "checkpointing", columns) == rows(tmp_path / "plain", columns)
    for one, other in zip(rows(tmp_path / "bf16", columns), rows(tmp_path / "plain", columns), strict=True):
        assert [float(v) for v in one.values()] == pytest.approx([float(v) for v in other.values()], rel=0.05)


def test_the_balance_coefficient_can_be_replaced(tmp_path):
    model = converted(coefficient=0.5)
    result = tune(
        model, windows(), replace(SMALL, tokens=STEP, balance_coefficient=2.0), tmp_path / "run", progress=False
    )
    row = read_rows(result.log)[0]
    assert float(row["loss"]) == pytest.approx(float(row["cross_entropy"]) + 2.0 * float(row["balance"]), rel=1e-5)
    assert AutoModelForCausalLM.from_pretrained(result.folder).config.moh["balance_coefficient"] == 2.0


def test_routers_learn_at_their_own_rate(tmp_path):
    model = converted()
    before = {n: p.clone() for n, p in model.named_parameters()}
    config = replace(SMALL, tokens=STEP, router_learning_rate_factor=0.0, warmup=0.0)
    tune(model, windows(), config, tmp_path / "run", progress=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("moh_router" in name), name


def test_lora_trains_few_weights_resumes_and_is_merged(tmp_path):
    pytest.importorskip("peft")
    config = replace(SMALL, lora_rank=2)
    model = converted()
    before = {n: p.clone() for n, p in model.named_parameters()}
    whole = tune(model, windows(), config, tmp_path / "whole", progress=False)
    after = dict(whole.model.named_parameters())
    assert after.keys() == before.keys() and isinstance(whole.model, MoHModelMixin)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert any("moh_router" in n for n in moved) and any("q_proj" in n for n in moved)
    assert not any("norm" in n or "embed" in n for n in moved)
    loaded = AutoModelForCausalLM.from_pretrained(whole.folder)
    assert_same(dict(loaded.named_parameters()), after, rtol=0, atol=0)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("recipe.yaml", "fingerprint.json", "log.csv", "checkpoint-6"):
        (tmp_path / "whole" / name).rename(run / name)
    expected = rows(run)
    assert tune(converted(), windows(), config, run, resume=True, progress=False).resumed_from == 6
    assert rows(run) == expected


DISTRIBUTED = """
import sys
import torch
torch.set_num_threads(1)
sys.path[:0] = [{tests!r}]
import small_runs as t
from dataclasses import replace
from mixhead.tasks.language_modelling.train import tune
config = replace(t.SMALL, gradient_accumulation=1, tokens=4 * t.STEP)
tune(t.converted(), t.windows(), config, {folder!r}, progress=False)
"""


@pytest.mark.distributed
def test_two_processes_train_as_one_with_two_micro_batches(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "two")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    tune(converted(), windows(), replace(SMALL, tokens=4 * STEP), tmp_path / "one", progress=False)
    assert json.loads((tmp_path / "two" / "fingerprint.json").read_text())["processes"] == 2
    columns = ("step", "tokens", "loss", "cross_entropy", "balance", "smallest_load", "load_entropy", "gradient_norm")
    for one, other in zip(rows(tmp_path / "one", columns), rows(tmp_path / "two", columns), strict=True):
        assert [float(v) for v in one.values()] == pytest.approx([float(v) for v in other.values()], rel=1e-4)
    states = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    assert_same(*states, rtol=1e-3, atol=1e-4)


def test_a_thread_without_signals_can_tune(tmp_path):
    failures = []

    def work():
        try:
            tune(original(), windows(), replace(SMALL, tokens=STEP), tmp_path / "run", progress=False)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    model, run = original(), tmp_path / "run"
    with pytest.raises(MixheadError, match="int64"):
        tune(model, windows().float(), SMALL, run)
    with pytest.raises(MixheadError, match="holds the token 61, but LlamaForCausalLM knows 0 to 60"):
        tune(model, windows() + 1 + windows().max().neg() + VOCABULARY - 1, SMALL, run)
    with pytest.raises(MixheadError, match="needs a teacher"):
        tune(model, windows(), replace(SMALL, distillation_weight=0.5), run)
    with pytest.raises(MixheadError, match="distillation_weight is 0"):
        tune(model, windows(), SMALL, run, original())
    with pytest.raises(MixheadError, match="The teacher is the model itself"):
        tune(model, windows(), replace(SMALL, distillation_weight=0.5), run, model)
    with pytest.raises(MixheadError, match="too short for one optimizer step, which reads 48 tokens"):
        tune(model, windows(), replace(SMALL, tokens=47), run)
    with pytest.raises(MixheadError, match="half precision"):
        tune(original().to(torch.bfloat16), windows(), SMALL, run)
    (tmp_path / "file").write_text("")
    with pytest.raises(MixheadError, match="folder of the run cannot be made"):
        tune(model, windows(), SMALL, tmp_path / "file")
    assert not run.exists()
