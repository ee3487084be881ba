"""Parts of speech of English text, by the tagger of TextBlob: a lexicon, and rules of how a word changes beside others.

It needs no network and no model. In another language it would be wrong, so text that is hardly English gets none.
"""

from __future__ import annotations

from collections.abc import Sequence

from mixhead.report.word_classes import FUNCTION_WORDS, word_class

ENGLISH = 0.2  # least share of function words: English prose has about twice as many, German or a program under half
_TAGS = {
    "adjective": "JJ JJR JJS",
    "adverb": "RB RBR RBS WRB",
    "auxiliary": "MD",
    "conjunction": "CC",
    "determiner": "DT PDT WDT",
    "interjection": "UH",
    "name": "NNP NNPS",
    "noun": "NN NNS",
    "number": "CD",
    "particle": "POS RP TO",
    "preposition": "IN",
    "pronoun": "EX PRP PRP$ WP WP$",
    "verb": "VB VBD VBG VBN VBP VBZ",
}
_NAMES = {tag: name for name, tags in _TAGS.items() for tag in tags.split()}


def parts_of_speech(words: Sequence[str]) -> list[str] | None:
    """The part of speech of every word.

    Args:
        words: without white space around them, in the order of reading; punctuation marks are words too.

    Returns:
        None for a text that is hardly English, or where TextBlob is not installed.
    """
    letters = [word.lower() for word in words if word[:1].isalpha()]
    if sum(word in FUNCTION_WORDS for word in letters) <= ENGLISH * len(letters):
        return None
    try:
        from textblob.en import parser
    except ImportError:
        return None
    found: list[str] = []
    sentence: list[str] = []
    for word in [*words, ""]:
        sentence.append(word)
        # The tagger knows that the first word of a sentence has a capital.
        if word == "" or word[-1] in ".!?":
            found += [name_of(word, tag) for word, tag in parser.find_tags(sentence)]
            sentence = []
    return found[:-1]


def name_of(word: str, tag: str) -> str:
    """The part of speech behind a tag of the Penn Treebank; marks and numbers as `word_class` names them."""
    written = word_class(f" {word}")
    return written if written in ("punctuation", "number", "space") else _NAMES.get(tag, "other")
