"""Words, of which tokens are pieces.

Shape legend: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

APOSTROPHES = "'’"


def word_numbers(texts: Sequence[str], begins_T: Sequence[bool]) -> list[int]:
    """Which word each token is in, counting from 0: a word ends at white space, and where letters meet punctuation.

    Args:
        texts: what the tokens say, in the order of reading; "" continues the character before.
        begins_T: whether a token is the first one of its sequence.
    """
    numbers: list[int] = []
    number, last = -1, ""
    for text, begins in zip(texts, begins_T, strict=True):
        goes_on = not begins and number >= 0 and (text == "" or (last.isalnum() and continues(text)))
        number += not goes_on
        last = text[-1:] or ("" if begins else last)
        numbers.append(number)
    return numbers


def continues(text: str) -> bool:
    """Whether a text goes on with the word before: letters or digits, also behind an apostrophe."""
    return text[0].isalnum() or (text[0] in APOSTROPHES and text[1:2].isalpha())


def joined_words(texts: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """The words, without the white space around them."""
    words = [""] * (max(numbers, default=-1) + 1)
    for text, number in zip(texts, numbers, strict=True):
        words[number] += text
    return [word.strip() for word in words]
