"""`python -m mixhead.cli`, as torchrun starts it."""

from mixhead.cli import main

if __name__ == "__main__":
    main()
