"""The class of a token's word, from closed lists: what can be told of an English word without a tagger.

Function words belong to closed classes, so a list is exact for most of them; every other word is a content word, and
one whose first letter is a capital is counted apart. A part of speech from a tagger is better where there is one: give
it as a label (`log.labelled`, or `routing_labels` of the model).
"""

from __future__ import annotations

import unicodedata

_LISTS = {
    "determiner": "a an the this that these those each every some any no all both either neither another such",
    "pronoun": "i you he she it we they me him her us them my your his its our their mine yours hers ours theirs who "
    "whom whose which what myself yourself himself herself itself ourselves themselves one",
    "preposition": "of in to for with on at by from into about over after under between through during before without "
    "against among toward towards upon within across behind beyond near since until despite per",
    "conjunction": "and or but nor so yet if because although though while when where whether unless than as",
    "auxiliary": "is are was were be been being am do does did have has had will would shall should can could may "
    "might must not",
}
PUNCTUATION = {"Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps", "Sc", "Sk", "Sm"}  # of Unicode; not other symbols, as emoji
_CLASSES = {word: name for name, words in _LISTS.items() for word in words.split()}


def word_class(text: str) -> str:
    """determiner, pronoun, preposition, conjunction, auxiliary, number, punctuation, space, capitalised, continuation
    (a piece that continues a word) or other word.
    """
    word = text.strip()
    if not word:
        return "space"
    if all(unicodedata.category(character) in PUNCTUATION for character in word):
        return "punctuation"
    if any(character.isdigit() for character in word):
        return "number"
    if text[0].isalpha() and text[0].islower():
        return "continuation"
    if word.lower() in _CLASSES:
        return _CLASSES[word.lower()]
    return "capitalised" if word[0].isupper() else "other word"
