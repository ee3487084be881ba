"""Sentence pairs: out of aligned pages, and from wherever people keep them."""

from pathlib import Path

import pytest

from mixhead.data.aligned_pages import PARTS, SentencePair, handbook_pairs, help_pairs, part_of_page
from mixhead.data.sentence_pairs import read_pairs, write_pairs
from mixhead.errors import MixheadError


def page(body: str) -> str:
    return f"<html><head><title>x</title></head><body><p>no id</p>{body}<p id='alone'>Only here</p></body></html>"


@pytest.fixture
def help_folder(tmp_path: Path) -> Path:
    """Sixty pages in two languages; one sentence stands on all of them."""
    for number in range(60):
        for language, one, all_pages in (("en-US", "Page", "Everywhere"), ("de", "Seite", "Überall")):
            file = tmp_path / language / "text" / f"{number}.html"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(
                page(
                    f"<h1 id='h'>{one} <b>{number}</b></h1><p id='all'>{all_pages}</p><p id='code'>x = 1</p>"
                    f"<p id='menu'>{one} <span hidden='true' id='MACx'>wrong</span>"
                    f"<span hidden='true' id='defaultx'>right {number}</span><br>end</p>"
                ),
                encoding="utf-8",
            )
    return tmp_path


def test_help_pages_are_aligned_by_element_and_parted_by_page(help_folder: Path) -> None:
    parts = {part: help_pairs(help_folder, part) for part in PARTS}
    everything = [pair for pairs in parts.values() for pair in pairs]
    assert len(everything) == len(set(everything)) == 60 * 2 + 1
    assert SentencePair("Page 7", "Seite 7") in everything
    assert SentencePair("Page right 7 end", "Seite right 7 end") in everything
    # What stands on pages of several parts belongs to training, so that no test has been seen.
    assert SentencePair("Everywhere", "Überall") in parts["train"]
    for part in ("validation", "test"):
        assert parts[part] and all(part_of_page(f"text/{number(pair)}.html") == part for pair in parts[part])


def number(pair: SentencePair) -> str:
    return next(word for word in pair.source.split() if word.isdigit())


def test_handbook_paragraphs_are_aligned_by_their_order(tmp_path: Path) -> None:
    for language, texts in (("en-US", ("One", "Same", "Two")), ("de-DE", ("Eins", "Same", "Zwei"))):
        (tmp_path / language).mkdir()
        body = "".join(f"<div class='para'>{text} <div class='url'>http://x</div></div>" for text in texts)
        (tmp_path / language / "a.html").write_text(page(body), encoding="utf-8")
        fewer = page("<div class='para'>Left out</div>" * (1 if language == "de-DE" else 2))
        (tmp_path / language / "b.html").write_text(fewer, encoding="utf-8")
    assert handbook_pairs(tmp_path) == [SentencePair("One", "Eins"), SentencePair("Two", "Zwei")]


def test_files_and_folders_give_the_same_pairs(tmp_path: Path) -> None:
    pairs = [SentencePair("one", "eins"), SentencePair("two\u2028three", "zwei")]
    for suffix, side in (("en", 0), ("de", 1)):
        text = "".join(f"{pair[side]}\n" for pair in pairs) + "\n"
        for part in ("train", "valid"):
            (tmp_path / f"{part}.{suffix}").write_text(text, encoding="utf-8")
    assert read_pairs(f"{tmp_path}/train.en,{tmp_path}/train.de") == pairs
    assert read_pairs(str(tmp_path)) == read_pairs(f"{tmp_path}:validation") == pairs
    assert write_pairs(pairs, tmp_path / "out" / "pairs.tsv") == 2
    assert read_pairs(str(tmp_path / "out" / "pairs.tsv")) == [pairs[0], SentencePair("two three", "zwei")]


def test_a_dataset_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"translation": {"en": "one", "de": "eins"}}]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "wmt14"))
    assert read_pairs(str(tmp_path / "wmt14")) == [SentencePair("one", "eins")]
    assert read_pairs(str(tmp_path / "wmt14"), languages=("de", "en")) == [SentencePair("eins", "one")]
    with pytest.raises(MixheadError, match="no part test; it has train"):
        read_pairs(f"{tmp_path}/wmt14:test")
    with pytest.raises(MixheadError, match="no language fr"):
        read_pairs(str(tmp_path / "wmt14"), languages=("en", "fr"))


def test_data_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one\ntwo\n")
    (tmp_path / "a.de").write_text("eins\n")
    (tmp_path / "bad.tsv").write_text("one\teins\nno tab\n")
    (tmp_path / "empty.tsv").write_text("\n")
    for source, sentence in (
        (f"{tmp_path}/a.en,{tmp_path}/a.de", "has 2 lines, but .* has 1"),
        (f"{tmp_path}/bad.tsv", "Line 2 .* has no tab"),
        (f"{tmp_path}/empty.tsv", "holds no sentence pair"),
        (f"{tmp_path}/nowhere", "neither fetched data"),
        (str(tmp_path), "neither files like train.en nor a dataset"),
    ):
        with pytest.raises(MixheadError, match=sentence):
            read_pairs(source)
