"""The fast tests on each pair of Python and PyTorch that matters: `make test-versions`.

Python 3.11 with PyTorch 2.13, the oldest of both, is what `make test` runs on. Everything but PyTorch comes in its
newest version, without constraints, as a user's does. A Python that this machine lacks is skipped, and so is a PyTorch
that its package index does not offer.
"""

import nox
from nox.command import CommandFailed

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

PAIRS = [("3.11", "2.14.1"), ("3.12", "2.13.0"), ("3.13", "2.14.1"), ("3.13", "2.15.0"), ("3.14", "2.15.0")]

# What another Python or PyTorch can change; no kernel is compiled for instruction sets that this machine only stands in
# for, and pages and real models are tested once, by `make test`.
TESTS = [
    *("-m", "not slow and not real_model and not distributed"),
    *(
        "-n",
        "2",
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",
        "--ignore=tests/report",
        "-k",
        "not every_instruction_set",
    ),
]


@nox.session
@nox.parametrize(("python", "torch"), PAIRS)
def tests(session: nox.Session, torch: str) -> None:
    """The fast tests."""
    version = f"torch=={torch}"
    try:  # by pip, which knows where this machine keeps its builds; uv takes a fraction of pip's time for the rest
        session.install("--no-compile", version, "uv")
    except CommandFailed:
        session.skip(f"The package index offers no PyTorch {torch} for this Python.")
    session.run_install("python", "-m", "uv", "pip", "install", "-q", version, "-e", ".[dev]")
    session.run("python", "-m", "pytest", *TESTS, *session.posargs)
