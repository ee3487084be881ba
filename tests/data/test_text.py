"""The addresses, text files and token windows."""

from __future__ import annotations

from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mixhead.data.text import Address, Split, addresses, read_text_file, text_source, token_windows
from mixhead.errors import MixheadError

SPLITS: tuple[Split, ...] = get_args(Split)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: "w0" is 1, "w1" is 2 and so on; the end of a document is 0."""
    words = Tokenizer(models.WordLevel({"<end>": 0} | {f"w{n}": n + 1 for n in range(100)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")


def words(first: int, last: int) -> str:
    return " ".join(f"w{n}" for n in range(first, last))


def test_packed_addresses_stay_below_three_megabytes() -> None:
    packed = [entry for entry in files("mixhead.data").iterdir() if entry.name.startswith("addresses")]
    assert sum(len(entry.read_bytes()) for entry in packed) <= 3_000_000


def test_parts_are_disjoint_and_complete() -> None:
    texts = [address.text for split in SPLITS for address in addresses(split)]
    assert len(texts) == len(set(texts)) == 233
    assert {split: len(addresses(split)) for split in SPLITS} == {
        "train": 161,
        "calibration": 24,
        "validation": 24,
        "test": 24,
    }


def test_no_test_address_shares_more_than_a_twentieth_of_its_phrases_with_a_neighbour_in_another_part() -> None:
    def phrases(address: Address) -> set[tuple[str, ...]]:
        said = address.text.split()
        return {tuple(said[n : n + 12]) for n in range(len(said) - 11)}

    others = [address for split in SPLITS if split != "test" for address in addresses(split)]
    for address in addresses("test"):
        own = phrases(address)
        for other in others:
            if abs(other.year - address.year) == 1:
                assert len(own & phrases(other)) <= 0.05 * len(own), (address.year, other.year)


@pytest.mark.parametrize("split", SPLITS)
def test_every_era_stands_in_every_part(split: Split) -> None:
    years = [address.year for address in addresses(split)]
    assert years == sorted(years)
    assert years[0] <= 1800
    assert years[-1] >= 2015
    assert max(later - earlier for earlier, later in pairwise(years)) <= 21


def test_the_parts_do_not_change() -> None:
    first = [(address.year, address.president) for address in addresses("test")[:3]]
    assert first == [(1795, "George Washington"), (1805, "Thomas Jefferson"), (1812, "James Madison")]


def test_addresses_are_clean_prose() -> None:
    for split in SPLITS:
        for address in addresses(split):
            assert address.text == " ".join(address.text.split())
            assert all(character.isprintable() for character in address.text)
            assert len(address.text) > 5000


def test_unknown_part_is_refused() -> None:
    with pytest.raises(MixheadError, match=r"no part 'dev'; choose one of train, calibration, validation, test"):
        addresses("dev")  # type: ignore[arg-type]


def test_text_file_is_read_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfna\xc3\xafve\n")
    assert read_text_file(path) == "naïve\n"
    assert text_source(path) == text_source(str(path), "test") == ["naïve\n"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; give a file that holds text"),
        (b" \n\t\n", "is empty; give a file that holds text"),
        (b"\xef\xbb\xbf", "is empty; give a file that holds text"),
        (b"GGUF\x00\x01", "is a binary file .*NUL byte at 4.*give a plain text file in UTF-8"),
        ("caf\u00e9".encode("latin-1"), r"is not UTF-8 text \(byte 3 cannot be decoded\); convert it first"),
        ("text".encode("utf-16"), "is a binary file"),
    ],
)
def test_text_file_of_no_use_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(MixheadError, match=message):
        read_text_file(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MixheadError, match=r"There is no text file .*none\.txt"):
        read_text_file(tmp_path / "none.txt")
    with pytest.raises(MixheadError, match="is a folder; give a text file"):
        read_text_file(tmp_path)


def test_text_source_knows_the_addresses_and_their_parts() -> None:
    assert text_source("addresses") == [address.text for address in addresses("train")]
    assert text_source("addresses", "validation") == [address.text for address in addresses("validation")]
    assert text_source("addresses:test", "train") == [address.text for address in addresses("test")]
    with pytest.raises(MixheadError, match="no part 'dev'"):
        text_source("addresses:dev")


def test_windows_are_consecutive_and_documents_are_joined(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = token_windows(tokenizer, [words(0, 5), words(5, 12)], 4)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [[1, 2, 3, 4], [5, 0, 6, 7], [8, 9, 10, 11]]  # "w11" fills no window


def test_limited_windows_are_spread_over_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    everything = token_windows(tokenizer, [words(0, 60)], 6)
    some = token_windows(tokenizer, [words(0, 60)], 6, limit=4)
    assert some.tolist() == everything[[0, 2, 5, 7]].tolist()
    assert token_windows(tokenizer, [words(0, 60)], 6, limit=99).tolist() == everything.tolist()


def test_windows_tell_their_progress(tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[tuple[int, int]] = []
    token_windows(tokenizer, ["w1 w2"] * 3, 2, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("texts", "window", "limit", "message"),
    [
        ([words(0, 5)], 6, None, "has 5 tokens, fewer than one window of 6; give a longer text or a smaller window"),
        ([], 6, None, "has 0 tokens"),
        ([words(0, 5)], 1, None, "window must be at least 2 tokens"),
        ([words(0, 5)], 2, 0, "limit must be at least 1 window"),
    ],
)
def test_impossible_windows_are_refused(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], window: int, limit: int | None, message: str
) -> None:
    with pytest.raises(MixheadError, match=message):
        token_windows(tokenizer, texts, window, limit)
