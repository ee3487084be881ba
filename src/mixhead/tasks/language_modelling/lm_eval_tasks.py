r"""Two lm-eval tasks made from held-out text, evaluated offline: last-word cloze and choice of the true continuation.

`write_tasks` writes them into a folder, `evaluate_tasks` runs them on a model in memory. On a saved folder they run
from the command line with lm-eval's own arguments; this module stands in for the command `lm_eval` because a
converted checkpoint loads only after `import mixhead`:

    python -m mixhead.tasks.language_modelling.lm_eval_tasks run --model hf --model_args pretrained=OUT \
        --include_path TASKS --tasks mixhead_cloze,mixhead_choice --device cpu --batch_size 8
"""

from __future__ import annotations

import importlib.util
import json
import logging
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixhead.data.text import text_source
from mixhead.errors import MixheadError
from mixhead.files import write_text
from mixhead.models.context import check_ids, check_reads_forward, positions_of
from mixhead.modes import evaluation_mode
from mixhead.tasks.language_modelling.evaluate import Accuracy

CLOZE = "mixhead_cloze"
CHOICE = "mixhead_choice"
_INSTALL = "pip install 'mixhead[eval]'"

MIN_CONTEXT, MAX_CONTEXT = 40, 80  # words before the answer
MIN_CONTINUATION, MAX_CONTINUATION = 8, 15  # words of a continuation
_MIN_OPENING = 4  # words of the broken sentence that stand in the context of a choice
_CHOICES = 4

_SENTENCE_GAP = re.compile(r"(?<=[.?!])(?<!\b[A-Z]\.)(?<!\b(?:Mr|Dr|St|No)\.)(?<!\b(?:Mrs|Gen|Hon)\.)\s+(?=[A-Z])")
_EDITORIAL = re.compile(r"[\[\]*_]")  # footnotes and stage directions are no prose
_LAST_WORD = re.compile(r"[a-z]{4,}[.?!]")

Question = dict[str, Any]


@dataclass(frozen=True)
class TaskScores:
    """What `evaluate_tasks` found.

    Attributes:
        cloze: the last word of a sentence, every one of its tokens predicted greedily.
        choice: the true continuation has the highest likelihood among four of as many words (chance: 25%).
        choice_norm: the same by likelihood per character.
        seconds: wall time.
    """

    cloze: Accuracy
    choice: Accuracy
    choice_norm: Accuracy
    seconds: float


def write_tasks(
    directory: str | Path, texts: Sequence[str] | None = None, *, items: int = 500, seed: int = 0
) -> tuple[Path, ...]:
    """Writes both tasks as jsonl and yaml; the same arguments give the same questions everywhere.

    Questions of all documents take turns, so that the first few (lm-eval's `limit`) are a fair sample.

    Args:
        directory: made if absent; the yaml files name their jsonl by absolute path, so write anew after moving it.
        texts: held-out documents; None takes the test part of the addresses.
        items: at most so many questions in each task.
        seed: another seed, other questions.

    Returns:
        The files written.

    Raises:
        MixheadError: where the text gives no question or the files cannot be written.
    """
    if items < 1:
        raise MixheadError(f"items must be at least 1 question, but it is {items}.")
    texts = text_source("addresses", "test") if texts is None else texts
    directory = Path(directory).resolve()
    makers: dict[str, Callable[[list[str], random.Random], Iterator[Question]]] = {
        CLOZE: _cloze_questions,
        CHOICE: _choice_questions,
    }
    written: list[Path] = []
    for task, make in makers.items():
        per_text = [make(_sentences(text), random.Random(f"{seed} {task} {n}")) for n, text in enumerate(texts)]
        questions = list(islice(_taking_turns(per_text), items))
        if not questions:
            raise MixheadError(
                f"The text gives no question for {task}; give prose in sentences, {20 * MAX_CONTEXT} words or more."
            )
        lines = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
        data = directory / f"{task}.jsonl"
        written += [_write(data, lines), _write(directory / f"{task}.yaml", _task_yaml(task, data))]
    return tuple(written)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    limit: int | None = None,
    batch_size: int = 8,
    *,
    autocast: torch.dtype | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TaskScores:
    """Runs both tasks on a model in memory with lm-eval (no network; random state and mode of the model put back).

    Args:
        model: a causal language model.
        tokenizer: of the model.
        directory: where `write_tasks` wrote.
        limit: the first so many questions of each task; None asks all.
        batch_size: sequences in one forward pass; a choice takes four.
        autocast: a dtype such as torch.bfloat16 for the forward pass; None computes in the model's own.
        on_progress: called with (answers scored, answers in all) after every batch.

    Raises:
        MixheadError: where lm-eval is not installed, the tasks are missing, or a number is too small.
    """
    if limit is not None and limit < 1:
        raise MixheadError(f"limit must be at least 1 question, or None for all of them, but it is {limit}.")
    directory = Path(directory)
    _require_tasks(directory)
    require_lm_eval()
    import lm_eval
    from lm_eval.tasks import TaskManager

    check_reads_forward(model)
    start = time.perf_counter()
    positions = positions_of(model)
    with evaluation_mode(model), _random_state_kept():
        with _silenced("lm_eval.models.huggingface"):  # it warns of what `pretrained=model` cannot do, at each call
            language_model = _language_model_class(on_progress)(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                max_length=positions.count if positions.fixed else None,
                batch_size=batch_size,
                mixed_precision_dtype=autocast,
            )
        tasks = TaskManager(include_path=str(directory), include_defaults=False).load([CLOZE, CHOICE])
        # Not `simple_evaluate`: after every call it asks git, pip and the processor who they are, for seconds.
        results = lm_eval.evaluate(language_model, tasks, limit=limit, bootstrap_iters=0)
    samples = results["samples"]
    return TaskScores(
        cloze=_accuracy(samples[CLOZE], "acc"),
        choice=_accuracy(samples[CHOICE], "acc"),
        choice_norm=_accuracy(samples[CHOICE], "acc_norm"),
        seconds=time.perf_counter() - start,
    )


def main() -> None:
    """lm-eval's own command line; that this module was imported has made converted checkpoints loadable."""
    require_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


def _cloze_questions(sentences: list[str], rng: random.Random) -> Iterator[Question]:
    """The last word of a sentence after 40 to 80 words, whole sentences but for that word, in random order."""
    for index in _shuffled(range(len(sentences)), rng):
        opening, _, last = sentences[index].rpartition(" ")
        context = _context(sentences, index, opening)
        if context is not None and _LAST_WORD.fullmatch(last):
            yield {"context": context, "word": last[:-1]}


def _choice_questions(sentences: list[str], rng: random.Random) -> Iterator[Question]:
    """The end of a sentence among the ends, as many words long, of three other sentences of the same document."""
    for index in _shuffled(range(len(sentences)), rng):
        length = rng.randint(MIN_CONTINUATION, MAX_CONTINUATION)
        opening, ending = _break(sentences[index], length)
        context = _context(sentences, index, opening)
        if context is None or _EDITORIAL.search(ending):
            continue
        endings = {_break(sentence, length)[1] for sentence in sentences} - {ending, ""}
        others = sorted(other for other in endings if other not in context and not _EDITORIAL.search(other))
        if len(others) < _CHOICES - 1:
            continue
        choices = [*rng.sample(others, _CHOICES - 1), ending]
        rng.shuffle(choices)
        yield {"context": context, "choices": choices, "answer": choices.index(ending)}


def _break(sentence: str, length: int) -> tuple[str, str]:
    """Breaks off the last `length` words; ("", "") where too little would be left before them."""
    words = sentence.split()
    if len(words) < length + _MIN_OPENING:
        return "", ""
    return " ".join(words[:-length]), " ".join(words[-length:])


def _context(sentences: list[str], index: int, opening: str) -> str | None:
    """`opening` after as few whole sentences as make 40 words; None where that is impossible within 80 words."""
    context = opening
    for previous in reversed(sentences[:index]):
        if len(context.split()) >= MIN_CONTEXT:
            break
        context = f"{previous} {context}"
    fits = opening and MIN_CONTEXT <= len(context.split()) <= MAX_CONTEXT and not _EDITORIAL.search(context)
    return context if fits else None


def _sentences(text: str) -> list[str]:
    return _SENTENCE_GAP.split(" ".join(text.split()))


def _shuffled(numbers: Iterable[int], rng: random.Random) -> list[int]:
    order = list(numbers)
    rng.shuffle(order)
    return order


def _taking_turns(sources: Sequence[Iterator[Question]]) -> Iterator[Question]:
    """One question of each source after another, until all are used up."""
    return (question for question in chain.from_iterable(zip_longest(*sources)) if question is not None)


def _task_yaml(task: str, data: Path) -> str:
    config: dict[str, Any] = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(data.parent / ".cache")},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{context}}",
        "metadata": {"version": 1.0},
    }
    if task == CLOZE:
        config |= {"output_type": "loglikelihood", "doc_to_target": "{{' ' + word}}", "metric_list": _metrics("acc")}
    else:
        config |= {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": " ",
            "metric_list": _metrics("acc", "acc_norm"),
        }
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _metrics(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def _write(path: Path, text: str) -> Path:
    """`write_text` into a folder that is made if absent; returns the path."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise MixheadError(
            f"{path} cannot be written ({error.strerror}); free some disk or give another folder."
        ) from error
    return path


def _require_tasks(directory: Path) -> None:
    """lm-eval meets a missing or empty jsonl with an exception that says nothing."""
    for task in (CLOZE, CHOICE):
        for path in (directory / f"{task}.yaml", directory / f"{task}.jsonl"):
            if not path.is_file() or path.stat().st_size == 0:
                raise MixheadError(
                    f"{path} is missing or empty; write the tasks anew with write_tasks({str(directory)!r})."
                )


def require_lm_eval() -> None:
    """Raises where lm-eval is not installed: asked before long work, not after."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MixheadError(f"Cloze and choice accuracy need lm-eval, which is not installed; run `{_INSTALL}`.")


def _language_model_class(on_progress: Callable[[int, int], None] | None) -> Any:
    """lm-eval's model, which tells `on_progress` how far it is instead of drawing bars of its own."""
    from lm_eval.models.huggingface import HFLM

    class ReportingLM(HFLM):
        done = total = 0

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            del disable_tqdm
            self.done, self.total = 0, len(requests)
            return list(super().loglikelihood(requests, disable_tqdm=True))

        def _model_call(self, inps: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
            check_ids(self.model, inps)
            logits: torch.Tensor = super()._model_call(inps, *arguments, **keywords)
            self.done += inps.shape[0]
            if on_progress is not None:
                on_progress(self.done, self.total)
            return logits

    return ReportingLM


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """lm-eval seeds every generator; an evaluation amid a training run must not move it."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    noisy = logging.getLogger(name)
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noisy.setLevel(level)


def _accuracy(samples: list[dict[str, Any]], metric: str) -> Accuracy:
    """Share of right answers with its binomial standard error, in the order of the questions."""
    hits = tuple(bool(sample[metric]) for sample in sorted(samples, key=lambda sample: sample["doc_id"]))
    share = sum(hits) / len(hits)
    return Accuracy(share, (share * (1 - share) / max(len(hits) - 1, 1)) ** 0.5, hits)


if __name__ == "__main__":
    main()
