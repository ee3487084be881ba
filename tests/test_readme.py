"""What the README shows, works: its commands and programs are executed as they stand.

All blocks run in the README's order and in one folder, so that a later block may use what an earlier one made.
The folder is temporary and holds links to the entries of the repository: a command may name `benchmarks/...`,
and what it writes does not land in the checkout.

A `bash` block is one script that stops at the first failing command. A `python` block is one program and
stands alone, as a reader will paste it. Output belongs into a `text` block.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

# Executed by other means: cloning has happened, the two make targets are what runs this test or takes the
# length of a demo. Nothing else may join them.
ELSEWHERE = re.compile(r"git clone \S+( \S+)?|cd mixhead|make demo|make test")

RUN = {"bash": ["bash", "-euo", "pipefail"], "python": [sys.executable]}
SHOWN_ONLY = {"text", "mermaid", "yaml", "bibtex"}
TIMEOUT_S = 900

# Bars of transformers and lm-eval, which would run through those of our commands.
FOREIGN_BARS = re.compile(r"Loading weights|Tokenizing inputs|Running loglikelihood|\d+%\|")


class Block(NamedTuple):
    """A fenced block of a Markdown page."""

    language: str
    line: int  # of the opening fence, counted from 1
    text: str


def blocks_of(markdown: str) -> list[Block]:
    """Return the fenced blocks of a page. A block inside a list may be indented."""
    blocks, lines = [], markdown.splitlines()
    number = 0
    while number < len(lines):
        opening = re.fullmatch(r"(\s*)(`{3,}|~{3,})\s*([\w+-]*).*", lines[number])
        number += 1
        if not opening:
            continue
        indent, fence, language = opening.groups()
        start, body = number, []
        while number < len(lines) and lines[number].strip() != fence:
            body.append(lines[number].removeprefix(indent))
            number += 1
        if number == len(lines):
            raise ValueError(f"The block that opens at line {start} is never closed.")
        number += 1
        blocks.append(Block(language, start, "".join(f"{line}\n" for line in body)))
    return blocks


def script_of(block: Block) -> str:
    """Return what is to be executed of a block: all but the lines that are executed elsewhere.

    Such a line becomes `:`, the command that does nothing, so that line numbers in messages stay right.
    """
    if block.language != "bash":
        return block.text

    def elsewhere(line: str) -> bool:
        command = line.split(" #")[0].strip()
        return bool(command) and all(ELSEWHERE.fullmatch(part.strip()) for part in command.split("&&"))

    return "".join(":\n" if elsewhere(line) else f"{line}\n" for line in block.text.splitlines())


def does_something(script: str) -> bool:
    """Tell whether a script holds more than comments and `:`."""
    return any(line.strip() not in {"", ":"} and not line.strip().startswith("#") for line in script.splitlines())


PAGE = README.read_text(encoding="utf-8") if README.is_file() else ""
BLOCKS = [b for b in blocks_of(PAGE) if b.language in RUN and does_something(script_of(b))]


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """The folder in which the blocks run."""
    folder = tmp_path_factory.mktemp("readme")
    for entry in ROOT.iterdir():
        if entry.name != ".git":
            (folder / entry.name).symlink_to(entry)
    return folder


def test_readme_opens_with_the_two_commands():
    first = next((b for b in blocks_of(PAGE) if b.language == "bash"), None)
    assert first is not None, "README.md shows no bash block"
    assert "make demo" in first.text, "the first block of README.md is what a visitor types first"
    assert "make test" in PAGE


def test_readme_hides_no_command():
    """A block in another language would not be executed; so only those that hold no commands are allowed."""
    strange = [f"line {b.line}: {b.language!r}" for b in blocks_of(PAGE) if b.language not in {*RUN, *SHOWN_ONLY}]
    assert not strange, f"use bash, python or, for output, text: {strange}"


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=[f"{b.language}-line-{b.line}" for b in BLOCKS])
def test_block_runs(block, desk):
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    script = script_of(block)
    file = desk / f"readme-line-{block.line}.{block.language}"
    file.write_text(script, encoding="utf-8")
    try:
        run = subprocess.run(
            [*RUN[block.language], str(file)],
            cwd=desk, env=environment, timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        status, output = f"it ended with exit code {run.returncode}", run.stdout
        failed = run.returncode != 0
    except subprocess.TimeoutExpired as late:
        status, output = f"it did not end within {TIMEOUT_S} s", (late.stdout or b"").decode(errors="replace")
        failed = True
    if failed:
        pytest.fail(
            f"README.md, line {block.line}: the {block.language} block does not work, {status}.\n"
            f"--- block\n{script}--- end of its output\n{output[-4000:]}",
            pytrace=False,
        )
    if block.language == "bash":
        assert not FOREIGN_BARS.search(output)


# The reading of the page, tested by itself.

EXAMPLE = """\
# Title
```bash
git clone https://example.org/mixhead && cd mixhead
make demo  # ten minutes
mixhead doctor \\
  --help
make demon
```
Then:
  ~~~python
  for x in "ab":
      print(x)
  ~~~
````text
```bash
rm -rf everything
```
````
"""


def test_blocks_are_found_with_language_line_and_text():
    bash, python, text = blocks_of(EXAMPLE)
    assert (bash.language, bash.line) == ("bash", 2)
    assert python == Block("python", 10, 'for x in "ab":\n    print(x)\n')
    assert text == Block("text", 14, "```bash\nrm -rf everything\n```\n")


def test_only_what_runs_elsewhere_is_left_out():
    script = script_of(blocks_of(EXAMPLE)[0])
    assert script == ":\n:\nmixhead doctor \\\n  --help\nmake demon\n"
    assert does_something(script)
    assert not does_something(script_of(Block("bash", 1, "# first\nmake demo\n\nmake test\n")))
    assert does_something(script_of(Block("bash", 1, "make demo && mixhead doctor\n")))


def test_an_open_block_is_refused():
    with pytest.raises(ValueError, match="line 2 is never closed"):
        blocks_of("text\n```bash\nls\n")
