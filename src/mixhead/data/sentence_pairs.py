"""Sentence pairs for translation, from wherever they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mixhead.data.aligned_pages import PARTS, Part, SentencePair, handbook_pairs, help_pairs
from mixhead.data.fetch import data_folder
from mixhead.data.vocabulary import lines_of
from mixhead.errors import MixheadError
from mixhead.files import write_text

# Known by name, and fetched with `mixhead fetch NAME`.
NAMED: dict[str, Callable[[Path, Part], list[SentencePair]]] = {
    "libreoffice-help": help_pairs,
    "debian-handbook": lambda folder, part: handbook_pairs(folder),  # it has no parts
}
# How the parts are called in the folders and datasets that people have.
ALIASES: dict[Part, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev"),
    "test": ("test",),
}


def read_pairs(source: str, part: Part = "train", languages: tuple[str, str] = ("en", "de")) -> list[SentencePair]:
    """The sentence pairs behind a name; lines that are empty on either side are left out.

    Args:
        source: one of

            - "libreoffice-help", "debian-handbook" (fetched data, English and German; the handbook is one part);
            - a `.tsv` file, source and target between a tab; a file is one part;
            - two text files, `FILE.en,FILE.de`, whose lines belong together;
            - a folder with `train.en`, `train.de`, `valid.en` ... (WMT14 as usually prepared);
            - a Hugging Face dataset on disk, with a column `translation` (WMT14 as published there) or one column for
              each language.

            `:train`, `:validation` or `:test` behind a name or folder says which part, whatever `part` is.
        part: the part where the source does not say.
        languages: to translate from and into; they are the names of columns and the suffixes of files.

    Raises:
        MixheadError: where there is no such data, or its sides have different lengths.
    """
    name, colon, said = source.rpartition(":")
    if colon and said in PARTS:
        source, part = name, said
    pairs = [pair for pair in _read(source, part, languages) if pair.source.strip() and pair.target.strip()]
    if not pairs:
        raise MixheadError(f"{source} ({part}) holds no sentence pair.")
    return pairs


def _read(source: str, part: Part, languages: tuple[str, str]) -> Iterable[SentencePair]:
    if source in NAMED:
        return NAMED[source](data_folder(source), part)
    if source.endswith(".tsv"):
        return _tab_separated(Path(source))
    if "," in source:
        first, _, second = source.partition(",")
        return _two_files(Path(first), Path(second))
    folder = Path(source)
    if not folder.is_dir():
        raise MixheadError(
            f"{source} is neither fetched data ({', '.join(NAMED)}), a .tsv file, two files with a comma between them, "
            "nor a folder."
        )
    for alias in ALIASES[part]:
        files = [folder / f"{alias}.{language}" for language in languages]
        if files[0].is_file():
            return _two_files(*files)
    return _dataset(folder, part, languages)


def _tab_separated(path: Path) -> Iterator[SentencePair]:
    for number, line in enumerate(lines_of([path]), 1):
        fields = line.split("\t")
        if len(fields) < 2 and line.strip():
            raise MixheadError(f"Line {number} of {path} has no tab: it must stand between source and target.")
        if len(fields) >= 2:
            yield SentencePair(fields[0], fields[1])


def _two_files(first: Path, second: Path) -> list[SentencePair]:
    sources, targets = list(lines_of([first])), list(lines_of([second]))
    if len(sources) != len(targets):
        raise MixheadError(
            f"{first} has {len(sources):,} lines, but {second} has {len(targets):,}: line by line they must belong "
            "together."
        )
    return [SentencePair(*pair) for pair in zip(sources, targets, strict=True)]


def _dataset(folder: Path, part: Part, languages: tuple[str, str]) -> list[SentencePair]:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError:
        raise MixheadError("A dataset on disk needs the package datasets: pip install datasets.") from None
    try:
        data = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise MixheadError(
            f"{folder} holds neither files like train.{languages[0]} nor a dataset of the package datasets ({error})."
        ) from error
    if isinstance(data, DatasetDict):
        names = [alias for alias in ALIASES[part] if alias in data]
        if not names:
            raise MixheadError(f"The dataset in {folder} has no part {part}; it has {', '.join(data)}.")
        data = data[names[0]]
    return [_pair(row, languages, folder) for row in data]


def _pair(row: dict[str, Any], languages: tuple[str, str], folder: Path) -> SentencePair:
    sides = row.get("translation", row)
    missing = [language for language in languages if language not in sides]
    if missing:
        raise MixheadError(f"The dataset in {folder} has no language {missing[0]}; it has {', '.join(sides)}.")
    return SentencePair(*(sides[language] for language in languages))


def write_pairs(pairs: Iterable[SentencePair], path: Path) -> int:
    """Writes pairs as a `.tsv` file and returns how many; white space becomes single spaces."""
    lines = ["\t".join(" ".join(side.split()) for side in pair) for pair in pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{line}\n" for line in lines))
    return len(lines)
