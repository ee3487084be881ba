"""What every test shares: no network, one thread, one seed, the golden cases."""

import os

# Before any import that reads them. No test may reach for a hub, and the tokenizers' threads would only
# warn about the processes that some tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
# The same engines on every processor, in the processes that tests start too: nothing is measured, but in the tests that
# are about measuring.
os.environ["MIXHEAD_CROSSOVER"] = __file__.replace("conftest.py", "crossover.json")

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy
import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"

# What torch.compile made for another version of PyTorch, or for other instructions, must not be found: some of it is
# loaded all the same, and spoils the memory of the process.
MADE_FOR = f"{torch.__version__}-{os.environ.get('ATEN_CPU_CAPABILITY', 'all')}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"mixhead-inductor-{MADE_FOR}"))

# One thread everywhere, so that sums are made in the same order on a laptop and on a large server, and since
# `make test` runs two files at a time: threads of two OpenMP teams on one core wait for each other.
torch.set_num_threads(1)

# The same examples in each run: a red build can be repeated. No deadline: the first call of a kernel is slow.
hypothesis.settings.register_profile("mixhead", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("mixhead")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, the README's before all: at the end one process would wait for the other."""
    slow = {item.path for item in items for mark in item.iter_markers() if mark.name in ("slow", "distributed")}
    items.sort(key=lambda item: (item.path.name != "test_readme.py", item.path not in slow))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, in whatever order the tests run."""
    value = 0
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Makes this a machine that multiplies in bfloat16 so many times as fast as in float32."""
    from mixhead import precision

    def forget() -> None:
        precision.faster_in_bfloat16.cache_clear()
        precision.warn_if_slower.cache_clear()

    def of(factor: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(precision, "bfloat16_speed", lambda: factor)
        forget()

    yield of
    forget()


@pytest.fixture(scope="module")
def talking_llama() -> tuple[Any, Any]:
    """A Llama with random weights that uses two of four heads, and its byte-level vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import mixhead

    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(["the state of the union is strong"] * 5, trainer)
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = mixhead.convert(LlamaForCausalLM(sizes).eval(), mixhead.MoHConfig(active=0.5, shared=0.25))
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="</s>")


CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's Chromium without a window. The tests skip where it, or Playwright, is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield started
        started.close()


@dataclass(frozen=True)
class Golden:
    """One case computed by a published implementation. `tests/golden/README.md` says what each holds."""

    name: str
    entry: dict[str, Any]  # as it stands in index.json
    tensors: dict[str, torch.Tensor]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration under the published argument names."""
        return dict(self.entry.get("config", self.entry))

    @property
    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights under the published parameter names."""
        return self._under("w.")

    @property
    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients, by the name of the parameter or input that they belong to."""
        return self._under("grad.")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def _under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """`golden("moh_dit_attention_0")` loads that case. Fresh tensors each time: a test may change them."""
    index = json.loads((GOLDEN / "index.json").read_text(encoding="utf-8"))

    def load(name: str) -> Golden:
        if name not in index:
            raise KeyError(f"There is no golden case {name!r}. The cases are: {', '.join(sorted(index))}.")
        return Golden(name, index[name], load_file(GOLDEN / f"{name}.safetensors"))

    return load
