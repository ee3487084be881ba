"""`python -m mixhead`, where the command is not on the path."""

from mixhead.cli import main

if __name__ == "__main__":
    main()
