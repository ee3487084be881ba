"""The command line: one verb a file. `main` turns mistakes into sentences and exit code 2."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of the `mixhead` command."""
    # Every verb has bars of its own; those of other libraries would run through them. tqdm reads this at its import.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from mixhead.cli.app import run

    sys.exit(run(sys.argv[1:]))
