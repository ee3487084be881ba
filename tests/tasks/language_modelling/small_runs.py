"""A Llama of two small layers, its windows, and a short tuning of it; what the tests compare of two runs."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mixhead
from mixhead.tasks.language_modelling.train import TuneConfig
from mixhead.training.progress import read_rows

VOCABULARY, WINDOW = 61, 12
STEP = 4 * WINDOW  # tokens of an optimizer step in SMALL
SMALL = TuneConfig(
    tokens=8 * STEP,
    batch_size=2,
    gradient_accumulation=2,
    learning_rate=1e-2,
    precision="float32",
    save_every=3,
    warmup=0.2,
)
SAME = (
    "step",
    "tokens",
    "loss",
    "cross_entropy",
    "balance",
    "smallest_load",
    "load_entropy",
    "gradient_norm",
    "learning_rate",
)


def original(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=32, **{**sizes, **changes}
    )
    return LlamaForCausalLM(config)


def converted(coefficient=0.5, router="linear", **changes):
    config = mixhead.MoHConfig(active_heads=2, shared_heads=1, router=router, balance_coefficient=coefficient)
    return mixhead.convert(original(**changes), config)


def windows(count=9, seed=1):
    return torch.randint(0, VOCABULARY, (count, WINDOW), generator=torch.Generator().manual_seed(seed))


def rows(folder, columns=SAME):
    return [{name: row[name] for name in columns} for row in read_rows(Path(folder) / "log.csv")]


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")
