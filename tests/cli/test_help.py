"""Help is answered at once: nothing that computes is loaded for it."""

import os
import subprocess
import sys

import pytest

from mixhead.cli.app import app

HEAVY = ("torch", "transformers", "numpy", "safetensors", "diffusers", "huggingface_hub", "matplotlib", "PIL")

PROGRAM = f"""
import sys
from mixhead.cli.app import run
for verb in [line.split() for line in sys.stdin]:
    code = run([*verb, "--help"])
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    print("||", " ".join(verb), code, *loaded, file=sys.stderr)
"""


def verbs() -> list[str]:
    """Every verb and every verb of a verb, as they are typed; "" for `mixhead` itself."""
    commands = ["", *(command.name for command in app.registered_commands)]
    for group in app.registered_groups:
        commands.append(group.name)
        commands += [f"{group.name} {command.name}" for command in group.typer_instance.registered_commands]
    return commands


@pytest.fixture(scope="module")
def answered() -> subprocess.CompletedProcess[str]:
    """The help of all verbs, asked in one process one after the other."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"} | {"COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="\n".join(verbs()), env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_help_of_every_verb_loads_nothing_heavy_and_warns_of_nothing(answered):
    assert answered.returncode == 0, answered.stderr
    lines = answered.stderr.splitlines()
    assert [line.split() for line in lines] == [["||", *verb.split(), "0"] for verb in verbs()]


def test_help_names_every_verb(answered):
    assert len(verbs()) > 25
    for verb in verbs():
        assert " ".join(["Usage: mixhead", verb]).strip() in answered.stdout
