"""What README and docs say that a table of `benchmarks/results` holds is in that table."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?:\.\./)?benchmarks/results/([\w.-]+\.md)\)")
# Numbers with a point, which are measured; neither versions nor the numbers of papers.
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*\.\d+(?![\w.]*\d)")
PAPER = re.compile(r"arxiv(?:\.org/abs/)?[ /]?\d+\.\d+|release_\S+|\d+\.\d+\.\d+\S*", flags=re.IGNORECASE)


class Claim(NamedTuple):
    """Lines that name a table, and the names of the tables."""

    page: Path
    line: int
    text: str
    tables: tuple[str, ...]


def blocks(text: str) -> list[tuple[int, list[str]]]:
    """Runs of lines between empty ones, with the number of the first; a list item is a run of its own."""
    found: list[tuple[int, list[str]]] = []
    fresh = True
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            fresh = True
            continue
        if fresh or line.startswith(("- ", "* ", "#")):
            found.append((number, []))
        found[-1][1].append(line)
        fresh = False
    return found


def is_table(lines: list[str]) -> bool:
    return lines[0].startswith("|")


def claims(page: Path) -> list[Claim]:
    """What a page says of tables: a row, what stands in it; a paragraph, what stands in it and in tables beside it."""
    found = []
    whole = blocks(page.read_text(encoding="utf-8"))
    for place, (number, lines) in enumerate(whole):
        if is_table(lines):
            for offset, line in enumerate(lines):
                if LINK.search(line):
                    found.append(Claim(page, number + offset, line, tuple(LINK.findall(line))))
            continue
        text = "\n".join(lines)
        if not LINK.search(text):
            continue
        neighbours = (*whole[max(place - 1, 0) : place], *whole[place + 1 : place + 2])
        beside = [block for block in neighbours if is_table(block[1])]
        # A table whose rows name their own tables claims nothing here.
        text += "".join("\n" + line for _, rows in beside for line in rows if not any(LINK.search(r) for r in rows))
        found.append(Claim(page, number, text, tuple(LINK.findall(text))))
    return found


def numbers(text: str) -> list[str]:
    return [number.replace(",", "") for number in NUMBER.findall(PAPER.sub("", text))]


def is_in(number: str, table: list[float]) -> bool:
    """Whether a number of the table rounds to it, as it is or as a share in percent."""
    digits = len(number.partition(".")[2])
    return any(abs(value - float(number)) <= 0.5 * 10.0**-digits + 1e-9 for value in table)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_numbers_are_in_the_table_that_is_named(page):
    missing = []
    for claim in claims(page):
        held = [float(n) for table in claim.tables for n in numbers((RESULTS / table).read_text(encoding="utf-8"))]
        lacking = [number for number in numbers(claim.text) if not is_in(number, held)]
        if lacking:
            missing.append(f"{page.name}:{claim.line}: {', '.join(lacking)} not in {', '.join(claim.tables)}")
    assert not missing, "\n" + "\n".join(missing)


def test_the_rule_itself(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "| a | 1.25 |\n\nIt is 3.5% ([t](benchmarks/results/t.md), arXiv 2410.11842, torch 2.13.0).\n\n- 9.9\n"
    )
    [claim] = claims(page)
    assert (claim.line, claim.tables, numbers(claim.text)) == (3, ("t.md",), ["3.5", "1.25"])
    assert is_in("3.5", [3.46]) and is_in("1234.5", [1234.5]) and not is_in("1.25", [1.26, 1.2])
