"""The addresses and text files."""

from __future__ import annotations

from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest

from mixhead.data.text import Address, Split, addresses, read_text_file, text_source
from mixhead.errors import MixheadError

SPLITS: tuple[Split, ...] = get_args(Split)


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
