"""`mixhead translate`, `evaluate-translation`, `vocabulary`, `pairs`, `expert-words`: what translation needs."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.table import Table

from mixhead.cli.common import DTYPE_HELP, OVERWRITE_HELP, check_new_folder, console
from mixhead.errors import MixheadError
from mixhead.tasks.translation.config import TranslateConfig

DEFAULTS = TranslateConfig()
PAIRS = "libreoffice-help"
PAIRS_HELP = (
    "Sentence pairs: `libreoffice-help`, `debian-handbook`, a .tsv file, two files `FILE.en,FILE.de`, a folder with "
    "train.en, train.de …, or a dataset on disk; `:test` behind it names the part."
)
LANGUAGES_HELP = "Language to translate from, and into; columns and suffixes of files are called so."


def translate(
    model: Annotated[str, typer.Argument(help="Folder of a trained encoder-decoder.")],
    input: Annotated[str, typer.Option("-i", "--input", help="Text to translate, a line each; - reads a pipe.")] = "-",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File for the translations.")] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beams of the search.")] = DEFAULTS.beams,
    length_penalty: Annotated[
        float, typer.Option(help="A translation's score is divided by its length to this power.")
    ] = DEFAULTS.length_penalty,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Source tokens of a batch.")] = DEFAULTS.batch_tokens,
    look_ahead: Annotated[
        int, typer.Option(min=1, help="Lines that are read before the first is translated; 1 answers at once.")
    ] = DEFAULTS.look_ahead,
    max_source_tokens: Annotated[
        int, typer.Option(min=1, help="Longer lines are translated in pieces.")
    ] = DEFAULTS.max_source_tokens,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "float32",
) -> None:
    """Translates text line by line: one line out for each line in, in order. Warnings go to standard error."""
    from mixhead.data.vocabulary import lines_of
    from mixhead.precision import autocast_dtype
    from mixhead.tasks.translation.translate import load_translator, translate_lines

    config = TranslateConfig(beams, length_penalty, batch_tokens, look_ahead, max_source_tokens, autocast_dtype(dtype))
    with _opened(output) as target:
        network, tokenizer = load_translator(model)
        lines = _standard_input() if input == "-" else lines_of([Path(input)])
        for line in translate_lines(network, tokenizer, lines, config):
            target.write(line + "\n")
            target.flush()


def evaluate_translation_verb(
    model: Annotated[str, typer.Argument(help="Folder of a trained encoder-decoder.")],
    data: Annotated[str, typer.Option(help=PAIRS_HELP)] = f"{PAIRS}:test",
    languages: Annotated[tuple[str, str], typer.Option(help=LANGUAGES_HELP)] = ("en", "de"),
    sentences: Annotated[int | None, typer.Option(min=1, help="At most so many, spread evenly.")] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beams of the search.")] = DEFAULTS.beams,
    length_penalty: Annotated[
        float, typer.Option(help="A translation's score is divided by its length to this power.")
    ] = DEFAULTS.length_penalty,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "float32",
) -> None:
    """Scores a model: sacreBLEU and chrF with their signatures, and BLEU as the papers of WMT14 count it."""
    from mixhead.data.sentence_pairs import read_pairs
    from mixhead.precision import autocast_dtype
    from mixhead.tasks.translation.train import evaluate_translation, spread
    from mixhead.tasks.translation.translate import load_translator

    pairs = spread(read_pairs(data, "test", languages), sentences)
    network, tokenizer = load_translator(model)
    config = TranslateConfig(beams=beams, length_penalty=length_penalty, dtype=autocast_dtype(dtype))
    scores, seconds = evaluate_translation(network, tokenizer, pairs, config)
    table = Table("measure", "value", box=None)
    table.add_row("sentences", f"{scores.sentences:,}")
    table.add_row("sacreBLEU", f"{scores.bleu:.2f}")
    table.add_row("chrF", f"{scores.chrf:.2f}")
    table.add_row("compound-split BLEU", f"{scores.compound_split_bleu:.2f}")
    table.add_row("sacreBLEU signature", scores.bleu_signature)
    table.add_row("chrF signature", scores.chrf_signature)
    table.add_row("sentences per CPU second", f"{len(pairs) / seconds:.2f}")
    console.print(table)


def vocabulary(
    folder: Annotated[Path, typer.Argument(help="Folder for the vocabulary.")],
    files: Annotated[list[Path] | None, typer.Argument(help="Text files, in all languages.")] = None,
    data: Annotated[str | None, typer.Option(help="Train on sentence pairs instead. " + PAIRS_HELP)] = None,
    languages: Annotated[tuple[str, str], typer.Option(help=LANGUAGES_HELP)] = ("en", "de"),
    size: Annotated[int, typer.Option(help="Tokens of the vocabulary.")] = 32_768,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE_HELP)] = False,
) -> None:
    """Trains a vocabulary of subwords (byte-level BPE) for `vocabulary: FOLDER` of a recipe."""
    from mixhead.data.sentence_pairs import read_pairs
    from mixhead.data.vocabulary import lines_to_learn, train_vocabulary

    if (data is None) == (not files):
        raise MixheadError("Give either text files or --data.")
    check_new_folder(folder, overwrite=overwrite)
    if data is not None:
        texts: Iterator[str] = (side for pair in read_pairs(data, "train", languages) for side in pair)
    else:
        texts = itertools.chain.from_iterable(lines_to_learn(file) for file in files or [])
    tokenizer = train_vocabulary(texts, size)
    tokenizer.save_pretrained(folder)
    console.print(f"A vocabulary of {len(tokenizer):,} tokens is in {folder}.", markup=False, highlight=False)


def pairs(
    folder: Annotated[Path, typer.Argument(help="Folder for train.tsv, validation.tsv and test.tsv.")],
    data: Annotated[str, typer.Option(help=PAIRS_HELP)] = PAIRS,
    languages: Annotated[tuple[str, str], typer.Option(help=LANGUAGES_HELP)] = ("en", "de"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE_HELP)] = False,
) -> None:
    """Writes sentence pairs as files, to read or to use elsewhere; no page stands in two parts."""
    from mixhead.data.aligned_pages import PARTS
    from mixhead.data.sentence_pairs import read_pairs, write_pairs

    check_new_folder(folder, overwrite=overwrite)
    for part in PARTS:
        count = write_pairs(read_pairs(data, part, languages), folder / f"{part}.tsv")
        console.print(f"{folder / part}.tsv: {count:,} pairs", markup=False, highlight=False)


def expert_words_verb(
    model: Annotated[str, typer.Argument(help="Folder of a trained MoA encoder-decoder.")],
    data: Annotated[str, typer.Option(help=PAIRS_HELP)] = f"{PAIRS}:test",
    languages: Annotated[tuple[str, str], typer.Option(help=LANGUAGES_HELP)] = ("en", "de"),
    top: Annotated[int, typer.Option(min=1, help="Words of each expert.")] = 5,
    min_count: Annotated[int, typer.Option(min=1, help="Rarer words are left out.")] = 5,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File for the table.")] = None,
) -> None:
    """Shows how much each attention expert is used, and for which words more often than by chance (in each module
    at most 5% of those listed are).
    """
    from mixhead.data.sentence_pairs import read_pairs
    from mixhead.inspect.expert_use import expert_use
    from mixhead.report.word_statistics import expert_words, words_table
    from mixhead.tasks.translation.translate import load_translator

    network, tokenizer = load_translator(model)
    use = expert_use(network, tokenizer, read_pairs(data, "test", languages))
    words = {
        name: expert_words(module.selected_TE, module.words, top=top, min_count=min_count, block_T=module.sentence_T)
        for name, module in use.items()
    }
    with _opened(output) as target:
        target.write(words_table(words, {name: module.load_E for name, module in use.items()}) + "\n")


def _standard_input() -> Iterator[str]:
    """Lines of UTF-8; bytes that are none become signs that stand for them, so that no line is lost."""
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", errors="replace").rstrip("\r\n")


@contextmanager
def _opened(path: Path | None) -> Iterator[TextIO]:
    from mixhead.files import writing

    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")
        yield sys.stdout
        return
    with writing(path) as partial, partial.open("w", encoding="utf-8") as file:
        yield file
