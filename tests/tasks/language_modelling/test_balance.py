"""The balance loss counts once in a step, however the step is cut, and its whole gradient arrives."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_runs import SMALL, STEP, WINDOW, assert_same, converted, gradients, rows, windows
from transformers import Trainer, TrainingArguments

import mixhead
from mixhead import MixheadError
from mixhead.models.hugging_face.balance import balance_term, shifts_labels
from mixhead.tasks.language_modelling import trainer
from mixhead.tasks.language_modelling.train import tune


def with_lora(model):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["moh_router"], init_lora_weights=False
    )
    return peft.get_peft_model(model, lora)


class Mode:
    """A way of training, in which one step over the same windows must give the same gradients however it is cut."""

    def __init__(self, name, coefficient, router="linear"):
        self.model = converted(coefficient, router).train()
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp16_scaled": torch.float16}.get(name)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=name == "fp16_scaled")
        if name == "checkpointing":
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if name == "lora":
            self.model = with_lora(self.model)
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.0)

    def step(self, batches):
        """One optimizer step, as the Trainer makes it; (loss, gradients)."""
        items = sum(batch[:, 1:].numel() for batch in batches)
        total = 0.0
        for batch in batches:
            with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
                loss = self.model(input_ids=batch, labels=batch, num_items_in_batch=torch.tensor(items)).loss
            self.scaler.scale(loss).backward()
            total += loss.item()
        self.scaler.unscale_(self.optimizer)
        return total, gradients(self.model)


MODES = ["plain", "bf16", "fp16_scaled", "checkpointing", "lora"]


@pytest.mark.parametrize("router", ["linear", "two_stage", "query_norm"])
@pytest.mark.parametrize("name", MODES)
def test_balance_loss_counts_once_however_a_step_is_cut(name, router):
    if name == "lora" and router == "query_norm":
        pytest.skip("this router has no parameters to save")
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-6} if name in ("plain", "checkpointing", "lora") else {"rtol": 0.05, "atol": 3e-3}
    )
    ids = windows(2)
    whole, whole_gradients = Mode(name, 0.5, router).step([torch.cat([ids] * 3)])
    cut, cut_gradients = Mode(name, 0.5, router).step([ids] * 3)
    assert cut == pytest.approx(whole, rel=1e-5 if "plain" in name else 1e-3)
    assert_same(cut_gradients, whole_gradients, **tolerance)


@pytest.mark.parametrize("name", MODES)
def test_the_whole_gradient_of_the_balance_loss_arrives(name):
    """With the coefficient c it is c times the gradient of the mean of the layers' balance losses: not 0, not twice."""
    ids = windows(2)
    mode, without = Mode(name, 0.5), Mode(name, 0.0)
    loss, found = mode.step([ids, ids])
    base_loss, base = without.step([ids, ids])
    trace = mixhead.RoutingTrace()
    with torch.autocast("cpu", mode.autocast, enabled=mode.autocast is not None):
        mode.model(input_ids=ids, routing_trace=trace)
    balance = 0.5 * trace.balance_loss()
    balance.backward()
    expected = gradients(mode.model)
    assert loss - base_loss == pytest.approx(balance.item(), rel=1e-3)
    router = [n for n in expected if "router" in n and expected[n].abs().max() > 1e-4]
    assert router
    rough = name in ("bf16", "fp16_scaled")
    for n in router:
        torch.testing.assert_close(
            found[n] - base[n], expected[n], rtol=0.05 if rough else 1e-3, atol=2e-3 if rough else 1e-6
        )


def test_fp16_loss_scaling_changes_no_gradient():
    ids = windows(2)
    _, scaled = Mode("fp16_scaled", 0.5).step([ids, ids])
    _, plain = Mode("fp16", 0.5).step([ids, ids])
    assert_same(scaled, plain, rtol=0.02, atol=1e-3)


def test_reentrant_checkpointing_is_refused_where_it_would_lose_the_balance_loss():
    model = converted().train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(MixheadError, match="use_reentrant"):
        model(input_ids=windows(2), labels=windows(2))
    model.config.moh["balance_coefficient"] = 0.0
    model(input_ids=windows(2), labels=windows(2)).loss.backward()


def test_the_gradient_of_a_step_is_that_of_its_loss(tmp_path):
    """What `tune` computes itself, balance loss included, against the losses of the model's own forward."""
    config = replace(SMALL, tokens=STEP, warmup=0.0, max_grad_norm=math.inf)
    tune(converted(), windows(), config, tmp_path / "run", progress=False)
    order = trainer.WindowOrder(windows(), 4, config.seed)
    batches = [torch.stack([order[0], order[1]]), torch.stack([order[2], order[3]])]
    loss, found = Mode("plain", 0.5).step(batches)
    norm = torch.stack([gradient.norm() for gradient in found.values()]).norm()
    row = rows(tmp_path / "run")[0]
    assert float(row["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(row["gradient_norm"]) == pytest.approx(norm.item(), rel=1e-4)


def test_the_stock_trainer_counts_it_once(tmp_path):
    """Uneven micro-batches and its own count of the targets: the step of SGD is the sum of the shares."""
    batches = [windows(2), windows(2, seed=5)]
    labels = [ids.clone() for ids in batches]
    labels[0][:, :7] = -100
    model, twin = converted(), converted()
    items = sum((label[:, 1:] != -100).sum() for label in labels)
    for ids, label in zip(batches, labels, strict=True):
        trace = mixhead.RoutingTrace()
        logits = twin.train()(input_ids=ids, routing_trace=trace).logits
        share = (label[:, 1:] != -100).sum() / items
        language = F.cross_entropy(logits[:, :-1].flatten(0, 1), label[:, 1:].flatten(), reduction="sum") / items
        (language + 0.5 * trace.balance_loss() * share).backward()
    data = [{"input_ids": i, "labels": t} for i, t in zip(torch.cat(batches), torch.cat(labels), strict=True)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1, optim="sgd",
        learning_rate=1.0, max_grad_norm=1e9, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    stock = Trainer(model, arguments, train_dataset=data)
    stock._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(data)
    assert stock._loss_shifts_labels == shifts_labels(model)
    stock.train()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter -= parameter.grad
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-4, atol=1e-5)


def test_targets_are_counted_as_the_trainer_counts_them():
    model = converted(1.0)
    trace = mixhead.RoutingTrace()
    model(input_ids=windows(2), routing_trace=trace)
    labels = windows(2).clone()
    labels[0, 3:] = -100
    whole = trace.balance_loss()
    count = {"labels": labels, "num_items_in_batch": 40}
    torch.testing.assert_close(balance_term(model, trace, count), whole * (2 + WINDOW - 1) / 40)
    count["shift_labels"] = torch.full((2, WINDOW), -100)
    torch.testing.assert_close(balance_term(model, trace, count), whole * 0)
    torch.testing.assert_close(balance_term(model, trace, {"labels": labels}), whole)
