"""Perplexity, paired differences and the lm-eval tasks."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from mixhead.data.text import addresses, text_source
from mixhead.errors import MixheadError
from mixhead.tasks.language_modelling.comparison_table import Row
from mixhead.tasks.language_modelling.evaluate import (
    Accuracy,
    Perplexity,
    gap_band,
    heads_of,
    perplexity,
    ratio_band,
)
from mixhead.tasks.language_modelling.lm_eval_tasks import CHOICE, CLOZE, evaluate_tasks, write_tasks

LM_EVAL = "mixhead.tasks.language_modelling.lm_eval_tasks"
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([addresses("train")[0].text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", bos_token="<end>")


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()


@pytest.fixture
def windows_WT() -> Tensor:
    return torch.randint(300, (5, 17), generator=torch.Generator().manual_seed(1))


class TestPerplexity:
    def test_equals_the_definition(self, llama: LlamaForCausalLM, windows_WT: Tensor) -> None:
        with torch.no_grad():
            log_probs = llama(input_ids=windows_WT).logits.double().log_softmax(-1)
        total = -sum(log_probs[w, t, windows_WT[w, t + 1]].item() for w in range(5) for t in range(16))
        measured = perplexity(llama, windows_WT, batch_size=2)
        assert measured.tokens == 5 * 16
        assert measured.mean_nll == pytest.approx(total / 80, rel=1e-6)
        assert measured.perplexity == pytest.approx(math.exp(total / 80), rel=1e-5)
        assert len(measured.window_nll) == 5

    def test_does_not_depend_on_the_batch_size(self, llama: LlamaForCausalLM, windows_WT: Tensor) -> None:
        results = [perplexity(llama, windows_WT, batch_size=size).mean_nll for size in (1, 2, 3, 5, 100)]
        assert results == pytest.approx([results[0]] * 5, rel=1e-6)

    def test_equals_the_loss_of_the_model(self, llama: LlamaForCausalLM, windows_WT: Tensor) -> None:
        with torch.no_grad():
            loss = llama(input_ids=windows_WT, labels=windows_WT).loss
        assert perplexity(llama, windows_WT).mean_nll == pytest.approx(loss.item(), rel=1e-6)

    def test_autocast_changes_the_number_format_only(self, llama: LlamaForCausalLM, windows_WT: Tensor) -> None:
        exact, rough = perplexity(llama, windows_WT), perplexity(llama, windows_WT, autocast=torch.bfloat16)
        assert rough.mean_nll != exact.mean_nll
        assert rough.mean_nll == pytest.approx(exact.mean_nll, rel=0.02)

    def test_puts_every_mode_back_and_keeps_no_graph(self, llama: LlamaForCausalLM, windows_WT: Tensor) -> None:
        llama.train()
        llama.model.layers[0].eval()  # frozen on purpose
        before = [module.training for module in llama.modules()]
        perplexity(llama, windows_WT)
        assert [module.training for module in llama.modules()] == before
        assert all(parameter.grad is None for parameter in llama.parameters())

    def test_tells_its_progress(self, llama: LlamaForCausalLM, windows_WT: Tensor) -> None:
        seen: list[tuple[int, int]] = []
        perplexity(llama, windows_WT, batch_size=2, on_progress=lambda done, total: seen.append((done, total)))
        assert seen == [(2, 5), (4, 5), (5, 5)]

    def test_names_the_window_that_gives_nan(self, windows_WT: Tensor) -> None:
        class Breaks(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.anchor = nn.Parameter(torch.zeros(()))

            def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
                logits = torch.zeros(*input_ids.shape, 300)
                logits[(input_ids == windows_WT[3]).all(-1), 7] = math.nan
                return SimpleNamespace(logits=logits)

        model = Breaks().train()
        with pytest.raises(MixheadError, match=r"gives nan as the loss of window 3 \(counted from 0\)"):
            perplexity(model, windows_WT, batch_size=2)
        assert model.training

    @pytest.mark.parametrize(
        "windows",
        [torch.zeros(3, dtype=torch.long), torch.zeros(2, 5), torch.zeros(0, 5).long(), torch.zeros(5, 1).long()],
    )
    def test_refuses_wrong_windows(self, llama: LlamaForCausalLM, windows: Tensor) -> None:
        with pytest.raises(MixheadError, match=rf"windows_WT must hold .*{re.escape(str(list(windows.shape)))}"):
            perplexity(llama, windows)

    def test_refuses_an_empty_batch(self, llama: LlamaForCausalLM, windows_WT: Tensor) -> None:
        with pytest.raises(MixheadError, match="batch_size must be at least 1"):
            perplexity(llama, windows_WT, batch_size=0)


class TestPairs:
    @pytest.mark.parametrize("questions", [10, 30, 200])
    @pytest.mark.parametrize("share", [0.02, 0.27, 0.86])
    def test_the_band_of_an_accuracy_holds_the_true_share_19_times_in_20(self, questions: int, share: float) -> None:
        rng = np.random.default_rng(0)
        bands = [answers(rng.random(questions) < share).band for _ in range(400)]
        assert np.mean([low <= share <= high for low, high in bands]) > 0.92

    def test_all_questions_answered_rightly_does_not_mean_certainty(self) -> None:
        assert str(answers(np.ones(30, bool))) == "100.0% (89–100)"
        assert str(answers(np.arange(100) < 86)) == "86.0% (78–91)"

    @pytest.mark.parametrize(("questions", "better", "worse"), [(30, 0.01, 0.02), (100, 0.05, 0.05), (400, 0.1, 0.2)])
    def test_the_band_of_a_gap_holds_the_true_one_19_times_in_20(
        self, questions: int, better: float, worse: float
    ) -> None:
        rng = np.random.default_rng(0)
        held = []
        for _ in range(400):
            at_N = rng.random(questions)
            new, base = answers(at_N < better), answers((at_N >= better) & (at_N < better + worse))
            low, high = gap_band(new, base)
            held.append(low <= better - worse <= high)
        assert np.mean(held) > 0.93
        same = answers(np.ones(30, bool))
        assert gap_band(same, same)[0] < -0.02

    @pytest.mark.parametrize(("windows", "alike", "least"), [(4, 0.0, 0.9), (32, 0.0, 0.93), (48, 0.3, 0.9)])
    def test_the_band_of_a_ratio_holds_the_true_one_19_times_in_20(
        self, windows: int, alike: float, least: float
    ) -> None:
        """Differences of losses have a long tail, and neighbouring windows are alike."""
        rng = np.random.default_rng(0)
        held = []
        for _ in range(400):
            gaps = rng.gamma(2.0, 0.01, windows + 20) - 0.02
            for place in range(1, len(gaps)):
                gaps[place] = alike * gaps[place - 1] + math.sqrt(1 - alike**2) * gaps[place]
            new, base = (Perplexity(1.0, 1, 1.0, tuple(of)) for of in (0.016 + gaps[20:], np.zeros(windows)))
            low, high = ratio_band(new, base)
            held.append(low <= math.exp(0.016) <= high)
        assert np.mean(held) > least

    def test_unpaired_measurements_are_refused(self) -> None:
        with pytest.raises(MixheadError, match="hold 0 and 0 windows"):
            ratio_band(Perplexity(1.0, 1, 1.0), Perplexity(1.0, 1, 1.0))
        with pytest.raises(MixheadError, match="hold 1 and 2 answers"):
            gap_band(Accuracy(1.0, 0.0, (True,)), Accuracy(1.0, 0.0, (True, True)))


def answers(right_N: np.ndarray) -> Accuracy:
    share = float(right_N.mean())
    return Accuracy(share, math.sqrt(share * (1 - share) / (len(right_N) - 1)), tuple(right_N.tolist()))


def questions(directory: Path, task: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


class TestTasks:
    def test_cloze_questions_are_as_promised(self, tmp_path: Path) -> None:
        write_tasks(tmp_path, items=200)
        texts = text_source("addresses", "test")
        asked = questions(tmp_path, CLOZE)
        assert len({question["context"] for question in asked}) == 200
        for question in asked:
            assert 40 <= len(str(question["context"]).split()) <= 80
            assert re.fullmatch("[a-z]{4,}", str(question["word"]))
            assert any(f"{question['context']} {question['word']}" in text for text in texts)

    def test_choices_are_as_promised(self, tmp_path: Path) -> None:
        write_tasks(tmp_path, items=200)
        texts = text_source("addresses", "test")
        answers = []
        for question in questions(tmp_path, CHOICE):
            choices = question["choices"]
            assert isinstance(choices, list) and len(set(choices)) == 4
            lengths = {len(choice.split()) for choice in choices}
            assert len(lengths) == 1 and 8 <= lengths.pop() <= 15
            home = next(text for text in texts if f"{question['context']} {choices[question['answer']]}" in text)
            assert all(choice in home and choice not in str(question["context"]) for choice in choices)
            assert 40 <= len(str(question["context"]).split()) <= 80
            answers.append(question["answer"])
        assert all(30 <= answers.count(answer) <= 70 for answer in range(4))

    def test_a_prefix_holds_every_address(self, tmp_path: Path) -> None:
        write_tasks(tmp_path, items=24)
        texts = text_source("addresses", "test")
        homes = [
            next(n for n, text in enumerate(texts) if str(q["context"]) in text) for q in questions(tmp_path, CLOZE)
        ]
        assert sorted(homes) == list(range(24))

    def test_same_seed_same_questions(self, tmp_path: Path) -> None:
        texts = text_source("addresses", "test")[:3]
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            write_tasks(tmp_path / name, texts, items=20, seed=seed)
        for task in (CLOZE, CHOICE):
            assert questions(tmp_path / "a", task) == questions(tmp_path / "b", task)
            assert questions(tmp_path / "a", task) != questions(tmp_path / "c", task)

    @pytest.mark.parametrize("texts", [[], ["No prose here."]])
    def test_text_without_questions_is_refused(self, tmp_path: Path, texts: list[str]) -> None:
        with pytest.raises(MixheadError, match=f"The text gives no question for {CLOZE}; give prose"):
            write_tasks(tmp_path / "out", texts)
        assert not (tmp_path / "out").exists()

    def test_a_model_is_evaluated_in_memory(
        self,
        tmp_path: Path,
        llama: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        pytest.importorskip("lm_eval", reason="lm-eval is not installed")
        write_tasks(tmp_path, items=6)
        llama.train()
        state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
        progress: list[tuple[int, int]] = []
        scores = evaluate_tasks(
            llama, tokenizer, tmp_path, limit=4, batch_size=3, on_progress=lambda *counts: progress.append(counts)
        )
        assert progress[-1] == (20, 20) and len(progress) == 7  # an answer to each cloze and four to each choice
        assert "loglikelihood" not in capsys.readouterr().err  # no bar of lm-eval runs through ours
        assert llama.training
        assert torch.equal(state[0], torch.get_rng_state())
        assert state[1:] == (random.getstate(), numpy.random.get_state()[1].tolist())
        assert [len(score.hits) for score in (scores.cloze, scores.choice, scores.choice_norm)] == [4, 4, 4]
        assert scores.cloze.value == 0.0  # 300 random tokens do not spell a word
        assert scores.choice.hits == tuple(self._answers(llama.eval(), tokenizer, questions(tmp_path, CHOICE)[:4]))
        share = scores.choice.value
        assert share == sum(scores.choice.hits) / 4
        assert scores.choice.stderr == pytest.approx(math.sqrt(share * (1 - share) / 3))

    @staticmethod
    def _answers(
        llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[dict[str, object]]
    ) -> list[bool]:
        """Whether the likelihood of the true choice is the highest, computed by hand."""
        right = []
        for question in asked:
            scores = []
            for choice in question["choices"]:  # type: ignore[attr-defined]
                whole = torch.tensor([tokenizer(f"{question['context']} {choice}").input_ids])
                start = len(tokenizer(str(question["context"])).input_ids)
                with torch.no_grad():
                    log_probs = llama(input_ids=whole).logits.log_softmax(-1)[0, start - 1 : -1]
                scores.append(log_probs.gather(-1, whole[0, start:, None]).sum().item())
            right.append(scores.index(max(scores)) == question["answer"])
        return right

    def test_missing_and_empty_tasks_are_refused(
        self, tmp_path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        with pytest.raises(MixheadError, match=r"mixhead_cloze\.yaml is missing or empty; write the tasks anew"):
            evaluate_tasks(llama, tokenizer, tmp_path)
        write_tasks(tmp_path, items=1)
        (tmp_path / f"{CHOICE}.jsonl").write_text("")
        with pytest.raises(MixheadError, match=r"mixhead_choice\.jsonl is missing or empty"):
            evaluate_tasks(llama, tokenizer, tmp_path)

    def test_missing_lm_eval_is_named_with_the_command(
        self,
        tmp_path: Path,
        llama: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        write_tasks(tmp_path, items=1)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MixheadError, match=r"lm-eval, which is not installed; run `pip install 'mixhead\[eval\]'`"):
            evaluate_tasks(llama, tokenizer, tmp_path)

    @pytest.mark.slow
    @needs_lm_eval
    def test_a_saved_folder_is_evaluated_from_the_command_line(
        self, tmp_path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        llama.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        write_tasks(tmp_path / "tasks", items=2)
        command = f"run --model hf --model_args pretrained={tmp_path / 'model'} --include_path {tmp_path / 'tasks'}"
        options = f"--tasks {CLOZE},{CHOICE} --device cpu --batch_size 2"
        done = subprocess.run(
            [sys.executable, "-m", LM_EVAL, *command.split(), *options.split()],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert CLOZE in done.stdout and CHOICE in done.stdout and "acc_norm" in done.stdout


def test_a_model_without_heads_has_none_in_the_table() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=4))
    row = Row("mamba", *heads_of(model), None, Perplexity(3.0, 100, 1.0))
    assert row.heads_active == "—"


def test_heads_of_the_language_model_inside_a_larger_one() -> None:
    text = {"num_attention_heads": 4, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    model = SimpleNamespace(config=LlavaConfig(text_config=LlamaConfig(**text)))
    assert heads_of(model) == (4, 4)  # type: ignore[arg-type]
