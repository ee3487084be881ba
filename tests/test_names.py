"""The names of the packages that load them when they are used first."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import mixhead

LAZY_PACKAGES = ["mixhead", "mixhead.convert"]
LAZY_PACKAGES += ["mixhead.models", "mixhead.models.hugging_face", "mixhead.models.moa", "mixhead.models.moh_vit"]


@pytest.mark.parametrize("name", LAZY_PACKAGES)
def test_every_name_is_there_and_shown(name):
    package = importlib.import_module(name)
    assert {*package.__all__} <= {*dir(package)}
    for public in package.__all__:
        assert getattr(package, public) is not None


@pytest.mark.parametrize("name", LAZY_PACKAGES)
def test_type_checkers_and_python_read_the_same_names(name):
    """What stands under `if TYPE_CHECKING` is what `__getattr__` finds, from the same places."""
    package = importlib.import_module(name)
    [branch] = [
        node
        for node in ast.parse(Path(package.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    for statement in branch.body:
        assert isinstance(statement, ast.ImportFrom)
        home = importlib.import_module(statement.module)
        for alias in statement.names:
            found = getattr(package, alias.name)
            if home is package:
                assert found is sys.modules[f"{name}.{alias.name}"]
            else:
                assert found is getattr(home, alias.name)
                assert alias.name in package.__all__


def test_an_unknown_name_is_refused_as_python_does():
    with pytest.raises(AttributeError, match="module 'mixhead' has no attribute 'transmogrify'"):
        mixhead.transmogrify  # noqa: B018


@pytest.mark.parametrize(
    "first",
    ["import mixhead.convert.swap", "from mixhead.convert.calibration import CalibrationConfig"],
)
def test_convert_and_calibrate_are_functions_whatever_was_imported_before(first):
    program = (
        f"{first}\nimport mixhead\nimport mixhead.convert.swap\n"
        "from mixhead.convert import calibrate\n"
        "print(callable(mixhead.convert), callable(mixhead.calibrate), calibrate is mixhead.calibrate)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == ["True", "True", "True"], run.stderr


def test_star_import_brings_the_public_names():
    names: dict[str, object] = {}
    exec("from mixhead import *", names)
    assert {*mixhead.__all__} <= {*names}


def test_rooms_are_attributes_of_the_root():
    """`import mixhead` is enough for `mixhead.interop.from_official(...)`."""
    rooms = ["interop", "models", "nn", "ops", "recording", "routing", "store"]
    program = (
        "import mixhead\n"
        f"for room in {rooms}:\n"
        "    print(getattr(mixhead, room).__name__)\n"
        "print(mixhead.models.moh_vit.MoHTransNeXtConfig.model_type)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == [*(f"mixhead.{room}" for room in rooms), "moh_vit"], run.stderr
