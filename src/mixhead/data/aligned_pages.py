"""Sentence pairs out of HTML pages that exist in two languages: the help of LibreOffice, the Debian handbook.

Both are translated paragraph by paragraph. In the help a paragraph and its translation bear the same element id; in the
handbook they are the n-th paragraph of pages with the same name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal, NamedTuple

from mixhead.errors import MixheadError

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
HELD_OUT_PERCENT = 3  # of the pages, for validation and for test each

Attributes = dict[str, str | None]
PARAGRAPHS = ("p", "h1", "h2", "h3", "h4", "h5", "h6")
EMPTY = frozenset(("area", "base", "br", "col", "hr", "img", "input", "link", "meta", "wbr"))  # have no end tag


class SentencePair(NamedTuple):
    """A sentence (or paragraph) and its translation; each is one line."""

    source: str
    target: str


class ElementTexts(HTMLParser):
    """The texts of chosen elements, in order, with white space as one space.

    Args:
        chosen: by tag and attributes; an element inside a chosen one belongs to it.
        hidden: by attributes; what is inside leaves no text.
    """

    def __init__(self, chosen: Callable[[str, Attributes], bool], hidden: Callable[[Attributes], bool]) -> None:
        super().__init__(convert_charrefs=True)
        self._chosen, self._hidden = chosen, hidden
        self._open: list[tuple[str, bool, bool]] = []  # tag, whether it was chosen, whether it hides
        self._words: list[str] | None = None
        self._key, self._hiding = "", 0
        self.texts: list[tuple[str, str]] = []  # id (or nothing) and text

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag in EMPTY:
            self.handle_data(" ")
            return
        chosen = self._words is None and self._chosen(tag, attributes)
        hides = self._words is not None and self._hidden(attributes)
        if chosen:
            self._words, self._key = [], attributes.get("id") or ""
        self._hiding += hides
        self._open.append((tag, chosen, hides))

    def handle_endtag(self, tag: str) -> None:
        if all(opened != tag for opened, *_ in self._open):
            return
        while self._open:
            opened, chosen, hides = self._open.pop()
            self._hiding -= hides
            if chosen and self._words is not None:
                self.texts.append((self._key, " ".join("".join(self._words).split())))
                self._words = None
            if opened == tag:
                return

    def handle_data(self, data: str) -> None:
        if self._words is not None and not self._hiding:
            self._words.append(data)


def help_pairs(folder: Path, part: Part, source: str = "en-US", target: str = "de") -> list[SentencePair]:
    """Pairs of the LibreOffice help; no page, and no source sentence, stands in two parts.

    The part of a page is drawn from a hash of its path and never changes. Pages embed one another, so that a sentence
    may stand on several: it belongs to training if any of them does, else to validation. Each pair is given once, and
    pairs whose sides are equal (code, names) are left out.

    Args:
        folder: with one folder for each language, see `mixhead.data.fetch`.
        part: which pages.
        source: the folder of the language to translate from.
        target: the folder of the language to translate into.

    Raises:
        MixheadError: where a folder holds no help pages of both languages.
    """
    pairs: dict[SentencePair, None] = {}
    part_of: dict[str, Part] = {}
    for original, translated in _pages(folder / source, folder / target):
        of_page = part_of_page(str(original.relative_to(folder / source)))
        texts, translations = _help_texts(original), _help_texts(translated)
        for key, text in texts.items():
            translation = translations.get(key)
            if text and translation and text != translation:
                pairs[SentencePair(text, translation)] = None
                part_of[text] = min(of_page, part_of.get(text, of_page), key=PARTS.index)
    return [pair for pair in pairs if part_of[pair.source] == part]


def handbook_pairs(folder: Path, source: str = "en-US", target: str = "de-DE") -> list[SentencePair]:
    """Paragraphs of the Debian handbook that are translated, each once: a test of another domain than the help's.

    Raises:
        MixheadError: where a folder holds no pages of both languages.
    """
    pairs: dict[SentencePair, None] = {}
    for original, translated in _pages(folder / source, folder / target):
        texts, translations = _handbook_texts(original), _handbook_texts(translated)
        if len(texts) != len(translations):
            continue  # the translation is of another edition of this page: its paragraphs cannot be told apart
        for text, translation in zip(texts, translations, strict=True):
            if text and translation and text != translation:
                pairs[SentencePair(text, translation)] = None
    return list(pairs)


def part_of_page(name: str) -> Part:
    """A fixed draw: 3 % of the pages are for test, 3 % for validation."""
    lot = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    if lot < HELD_OUT_PERCENT:
        return "test"
    return "validation" if lot < 2 * HELD_OUT_PERCENT else "train"


def _pages(source: Path, target: Path) -> Iterator[tuple[Path, Path]]:
    found = False
    for page in sorted(source.rglob("*.html")):
        other = target / page.relative_to(source)
        if other.is_file():
            found = True
            yield page, other
    if not found:
        raise MixheadError(f"{source} and {target} have no HTML page in common.")


def _help_texts(page: Path) -> dict[str, str]:
    """Paragraphs and headings by element id, the first of each; of alternatives for systems the default one."""
    parser = ElementTexts(
        lambda tag, attributes: tag in PARAGRAPHS and bool(attributes.get("id")),
        lambda attributes: "hidden" in attributes and not (attributes.get("id") or "").startswith("default"),
    )
    parser.feed(page.read_text(encoding="utf-8"))
    texts: dict[str, str] = {}
    for key, text in parser.texts:
        texts.setdefault(key, text)
    return texts


def _handbook_texts(page: Path) -> list[str]:
    parser = ElementTexts(
        lambda tag, attributes: tag == "div" and attributes.get("class") == "para",
        lambda attributes: attributes.get("class") == "url",
    )
    parser.feed(page.read_text(encoding="utf-8"))
    return [text for _, text in parser.texts]
