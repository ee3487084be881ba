"""The command line: one verb a file. `main` turns mistakes into sentences and exit code 2."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `mixhead` command."""
    from mixhead.cli.app import run

    sys.exit(run(sys.argv[1:]))
