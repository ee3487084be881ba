"""`python -m mixhead.cli`, as torchrun starts it."""

import sys

from mixhead.cli import main

if __name__ == "__main__":
    sys.exit(main())
