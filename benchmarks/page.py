"""The page of a benchmark: its table is shown as it grows; `--write` keeps it, one page and one JSON for each machine.

A page holds the table of each command that was run on the machine, the newest run of it alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from mixhead.bench.results import describe_machine

RESULTS = Path(__file__).parent / "results"


class Page:
    """A table in the making.

    Args:
        title: of the page.
        columns: of the table.
        about: what the rows have in common, a sentence or two.
        write: whether the table is kept.
    """

    def __init__(self, title: str, columns: list[str], about: str, write: bool) -> None:
        self.title, self.write = title, write
        self.script = Path(sys.argv[0]).name
        words = [word for word in sys.argv[1:] if word != "--write"]
        self.run = {
            "command": " ".join(["python", f"benchmarks/{self.script}", *words]),
            "about": about,
            "machine": describe_machine(),
            "columns": columns,
            "rows": [],
        }
        print(header(self.run))

    def add(self, *cells: str) -> None:
        """Shows a row."""
        self.run["rows"].append(cells)
        print(f"| {' | '.join(cells)} |", flush=True)

    def close(self) -> None:
        """Keeps the table where that was asked for."""
        if not self.write:
            return
        where = self.run["machine"]
        machine = re.sub(r"\W+", "-", f"{where['cpu']} {where['instruction_set']}").strip("-")
        path = RESULTS / f"{Path(self.script).stem}-{machine.lower()}.json"
        runs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        runs = [run for run in runs if run["command"] != self.run["command"]] + [self.run]
        path.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
        tables = [header(run) + "".join(f"\n| {' | '.join(row)} |" for row in run["rows"]) for run in runs]
        path.with_suffix(".md").write_text("\n\n".join([f"# {self.title}", *tables]) + "\n", encoding="utf-8")


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")


def header(run: dict) -> str:
    """What stands above the rows of a run."""
    machine = run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = (
        f"{machine['date'][:10]}, {machine['cpu']} ({machine['instruction_set']}), {machine['cores']} cores; {versions}"
    )
    lines = [f"| {' | '.join(cells)} |" for cells in (run["columns"], ["---"] * len(run["columns"]))]
    return f"`{run['command']}`, {where}. {run['about']}\n\n" + "\n".join(lines)
