"""The house stands as `docs/architecture.md` draws it.

A rule that nothing checks is a wish. These tests read the sources (with ast, so that an import hidden in a
function counts as well) and say which line breaks which rule.
"""

import ast
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "mixhead"

# From the ground up. A room imports only rooms below it.
ROOMS = (
    "routing", "recording", "ops", "nn", "models", "interop", "store", "convert",
    "training", "data", "tasks", "bench", "report", "inspect", "cli",
)  # fmt: skip

# Libraries that a room must know nothing of. The ground floor is plain PyTorch: it can be used, tested and
# compiled without a model library.
STRANGERS = {
    "routing": {"transformers", "accelerate", "peft", "datasets"},
    "ops": {"transformers", "accelerate", "peft", "datasets"},
    "nn": {"transformers", "accelerate", "peft", "datasets"},
    "models": {"datasets", "lm_eval"},
}

# `import mixhead` loads none of them: what is heavy comes with the first name that is used, what is optional when it
# runs.
HEAVY = ("torch", "torch._dynamo", "transformers", "transformers.modeling_utils", "numpy", "safetensors", "pydantic")
OPTIONAL = ("triton", "lm_eval", "matplotlib", "peft", "datasets", "diffusers")

MAX_LINES = 600  # of any Python file, tests and benchmarks too
MAX_LINES_OF_SOURCE, MAX_LINES_OF_A_FUNCTION = 400, 60
# What is longer still. This list only gets shorter.
LONGER_FILES: set[str] = set()
LONGER_FUNCTIONS = {
    "cli/convert.py: convert",  # one parameter an option, as typer has it
    "cli/tune.py: tune",
    "inspect/play.py: page",
    "models/moa/transformer.py: forward",
    "nn/moa.py: forward",
    "ops/triton/kernels.py: forward",
    "ops/triton/kernels.py: key_gradient",
}
# Rooms whose files still import each other in a circle. This list only gets shorter.
CIRCLES_LEFT = {"models"}
# Loose files in `tasks`: every task may use them, and `registry` knows every task.
SHARED_BY_TASKS = {"moa_training"}


class Import(NamedTuple):
    """One imported name, with the place where it is imported."""

    file: Path
    line: int
    name: str  # dotted and absolute: "mixhead.ops.api", "transformers.AutoModel"


def imports_of(source: str, file: Path, package: str) -> Iterator[Import]:
    """Yield every import in `source`, lazy and relative ones too.

    Args:
        source: text of a Python file.
        file: its path, for messages.
        package: dotted name of the package that holds the file; relative imports start there.
    """
    for node in ast.walk(ast.parse(source, filename=str(file))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            start = parts[: len(parts) - (node.level - 1)] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
            and ast.unparse(node.func) in {"importlib.import_module", "import_module", "__import__"}
        ):
            names = [node.args[0].value]
            if names[0].startswith("."):
                level = len(names[0]) - len(names[0].lstrip("."))
                start = package.split(".")
                start = start[: len(start) - (level - 1)]
                names = [".".join([*start, names[0].lstrip(".")])]
        else:
            continue
        for name in names:
            yield Import(file, node.lineno, name)


def room_of(dotted: str) -> str | None:
    """Return the part of mixhead that a dotted name lies in.

    That is a room; "" for the package's root, which opens every room; or the name of a loose module on the
    ground (`errors`), which every room may use. None: not ours.
    """
    first, *rest = dotted.split(".")
    if first != "mixhead":
        return None
    loose = {f.stem for f in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    return rest[0] if rest and rest[0] in {*ROOMS, *loose} else ""


def refusal(home: str, wanted: str) -> str | None:
    """Say why a file of room `home` may not import `wanted` (a dotted name), or None if it may."""
    room, library = room_of(wanted), wanted.split(".")[0]
    if library in STRANGERS.get(home, ()):
        return f"{home} knows nothing of {library}"
    # The operators take a Routing, whoever made it.
    if home == "ops" and room == "routing" and "router" in wanted.lower():
        return "ops uses the value Routing, not the routers"
    if room is None or room == home:
        return None
    if room == "":
        return None if home == "cli" else "the root package opens every room: name the room itself"
    if room not in ROOMS:
        return None
    if home not in ROOMS:
        return f"{home} lies on the ground, below every room"
    if ROOMS.index(room) > ROOMS.index(home):
        return f"{room} lies above {home}"
    return None


def between_tasks(home: str, wanted: str) -> str | None:
    """Say why a file of the task `home` may not import `wanted` (a dotted name), or None if it may."""
    parts = wanted.split(".")
    if parts[:2] != ["mixhead", "tasks"] or len(parts) < 3 or home == "registry":
        return None
    return None if parts[2] in {home, *SHARED_BY_TASKS} else f"the task {home} knows no other"


def all_imports() -> list[tuple[str, Import]]:
    """Every import of the package, with the room of the file that makes it."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        inside = file.relative_to(PACKAGE)
        if len(inside.parts) == 1 and inside.stem in {"__init__", "__main__"}:
            continue  # the root opens every room
        package = ".".join(["mixhead", *inside.parts[:-1]])
        home = inside.parts[0].removesuffix(".py")
        found += [(home, i) for i in imports_of(file.read_text(encoding="utf-8"), file, package)]
    return found


def repository_files() -> list[Path]:
    """The files that git knows or would add: neither caches nor environments."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return [p for name in sorted(set(listing.split("\0"))) if name and (p := ROOT / name).is_file()]


def test_every_folder_is_a_room():
    folders = {f.parent.relative_to(PACKAGE).parts[0] for f in PACKAGE.glob("*/**/*.py")}
    assert folders <= set(ROOMS), f"no room of the house: {sorted(folders - set(ROOMS))}"


def test_imports_point_downwards():
    broken = [
        f"{i.file.relative_to(ROOT)}:{i.line} imports {i.name}: {why}"
        for home, i in all_imports()
        if (why := refusal(home, i.name))
    ]
    assert not broken, "\n" + "\n".join(broken)


def test_no_task_knows_another():
    broken = []
    for file in sorted((PACKAGE / "tasks").rglob("*.py")):
        inside = file.relative_to(PACKAGE / "tasks").parts
        home, package = inside[0].removesuffix(".py"), ".".join(["mixhead", "tasks", *inside[:-1]])
        for i in imports_of(file.read_text(encoding="utf-8"), file, package):
            if why := between_tasks(home, i.name):
                broken.append(f"{i.file.relative_to(ROOT)}:{i.line} imports {i.name}: {why}")
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in CIRCLES_LEFT])
def test_no_circle_of_files(room):
    """No file of a room needs, over however many others, itself."""
    files = {
        ".".join(["mixhead", *f.relative_to(PACKAGE).with_suffix("").parts]): f
        for f in [*(PACKAGE / room).rglob("*.py"), *PACKAGE.glob(f"{room}.py")]
        if f.stem != "__init__"
    }
    needs = {name: set() for name in files}
    for name, file in files.items():
        for i in imports_of(file.read_text(encoding="utf-8"), file, name.rpartition(".")[0]):
            needs[name] |= {i.name, i.name.rpartition(".")[0]} & files.keys() - {name}
    while leaves := [name for name, needed in needs.items() if not needed]:
        needs = {name: needed - set(leaves) for name, needed in needs.items() if name not in leaves}
    assert not needs, f"a circle of imports runs through {sorted(needs)}"


@pytest.mark.parametrize(
    ("operator", "names"),
    [
        ("attention", {"reference", "dense", "gathered", "slots", "cpu", "triton", "flex"}),
        ("projections", {"reference", "dense", "gathered"}),
        ("slot_projections", {"reference", "dense", "gathered"}),
    ],
)
def test_implementations_know_no_other(operator, names):
    """An engine is a file with an `ENGINE`; only `engines` and `choose` see more than one."""
    folder = PACKAGE / "ops" / operator
    files = {f.stem: f.read_text(encoding="utf-8") for f in folder.glob("*.py")}
    engines = {
        name
        for name, text in files.items()
        if any(isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "ENGINE" for n in ast.parse(text).body)
    }
    known = {
        (name, other)
        for name in engines
        for i in imports_of(files[name], folder / f"{name}.py", f"mixhead.ops.{operator}")
        for other in engines - {name}
        if f"{i.name}.".startswith(f"mixhead.ops.{operator}.{other}.")
    }
    assert engines == names
    assert not known, f"one implementation imports another: {sorted(known)}"


# What the outermost room may not do: compute. `doctor` says what is installed.
COMPUTES = {"torch", "numpy", "transformers", "safetensors", "diffusers"}
MAX_LINES_BESIDE_A_VERB = 40


def run_time_imports(text: str, file: Path, package: str) -> set[str]:
    """Names that a file imports when it runs: not those under `if TYPE_CHECKING`."""
    tree = ast.parse(text)
    types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    lines = {line for node in types for line in range(node.lineno, node.end_lineno + 1)}
    return {i.name for i in imports_of(text, file, package) if i.line not in lines}


def test_the_command_line_holds_no_logic():
    """Its files load nothing that computes, and what is no verb is short."""
    broken = []
    for file in sorted((PACKAGE / "cli").glob("*.py")):
        text = file.read_text(encoding="utf-8")
        computes = {name.split(".")[0] for name in run_time_imports(text, file, "mixhead.cli")} & COMPUTES
        if computes and file.stem != "doctor":
            broken.append(f"{file.name} imports {', '.join(sorted(computes))}")
        functions = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
        for function in functions:
            verb = "Annotated[" in ast.unparse(function.args) or function.decorator_list
            if not verb and function.end_lineno - function.lineno >= MAX_LINES_BESIDE_A_VERB:
                broken.append(f"{file.name}: {function.name} is too long for what only parses and prints")
    assert not broken, "\n" + "\n".join(broken)


def test_reports_run_no_model():
    """They read recordings, logs and results: no room that computes, and no call that a model answers."""
    rooms = {"ops", "nn", "models", "convert", "interop", "store"}
    names_alone = "mixhead.models.patches."  # what labels of patches are called
    calls = {"forward", "generate", "from_pretrained", "no_grad", "inference_mode", "backward"}
    broken = []
    for file in sorted((PACKAGE / "report").glob("*.py")):
        text = file.read_text(encoding="utf-8")
        names = run_time_imports(text, file, "mixhead.report")
        broken += [
            f"{file.name} imports {name}"
            for name in sorted(names)
            if (room_of(name) in rooms and not name.startswith(names_alone))
            or name.startswith(("torch.nn", "transformers"))
        ]
        broken += [
            f"{file.name}:{node.lineno} calls {node.func.attr}"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in calls
        ]
    assert not broken, "\n" + "\n".join(broken)


def test_the_picture_shows_these_rooms_in_this_order():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert table == list(ROOMS), "the table of rooms in docs/architecture.md differs from ROOMS"


def test_no_file_is_too_long():
    too_long = {
        str(f.relative_to(ROOT)): n
        for f in repository_files()
        if f.suffix == ".py" and (n := len(f.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not too_long, f"more than {MAX_LINES} lines: {too_long}. Two ideas may be in one file."


def test_files_and_functions_of_the_source_are_short():
    files, functions = set(), set()
    for file in PACKAGE.rglob("*.py"):
        text, place = file.read_text(encoding="utf-8"), str(file.relative_to(PACKAGE))
        if len(text.splitlines()) > MAX_LINES_OF_SOURCE:
            files.add(place)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MAX_LINES_OF_A_FUNCTION:
                functions.add(f"{place}: {node.name}")
    assert files <= LONGER_FILES, f"more than {MAX_LINES_OF_SOURCE} lines: {sorted(files - LONGER_FILES)}"
    assert functions <= LONGER_FUNCTIONS, (
        f"more than {MAX_LINES_OF_A_FUNCTION} lines: {sorted(functions - LONGER_FUNCTIONS)}"
    )
    gone = sorted((LONGER_FILES - files) | (LONGER_FUNCTIONS - functions))
    if gone:
        warnings.warn(f"Short enough now, so off the list: {gone}", stacklevel=1)


def test_import_is_quiet_and_light():
    """`import mixhead` prints nothing, warns of nothing and loads nothing optional."""
    assert_loads("import mixhead", none_of=HEAVY + OPTIONAL)


def test_model_types_are_known_without_the_code_of_models():
    """Configurations join those of transformers, and neither torch's compiler nor its modelling comes with them."""
    program = "import mixhead; from transformers import AutoConfig; assert AutoConfig.for_model('mixhead')"
    assert_loads(program, none_of=("torch._dynamo", "transformers.modeling_utils", *OPTIONAL))


def test_every_name_of_the_root_is_quiet_and_needs_nothing_optional():
    """But Triton: where it is installed, transformers loads it with its first model."""
    assert_loads("from mixhead import *", none_of=tuple(name for name in OPTIONAL if name != "triton"))


def assert_loads(program: str, none_of: tuple[str, ...]) -> None:
    """Runs a program in a new process: it says nothing, and none of the modules is loaded afterwards."""
    program += f"\nimport sys\nsys.exit(' '.join(m for m in {none_of!r} if m in sys.modules) or 0)"
    # Python's own choice of warnings, as every user has it: a deprecation inside another library is hidden.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


# Traces of the machine on which a file was written, and of the notes beside it: they mean nothing to a
# reader. The brackets keep this list from finding itself.
PRIVATE = re.compile(
    r"""(?<![\w.\-])/(?:[w]ork|[r]oot)/"""  # absolute paths; not the middle of an address
    r"""|/[h]ome/[a-z]\w*/|/[U]sers/[a-z]\w*/"""
    r"""|\.\./[s]hared\b|\b[s]hared/(?:facts|quality|environment|anchors|performance|design|golden)\b"""
    r"""|\b(?:[f]acts|[a]nchors)\.md\b"""
    r"""|\b[i]ssues\ (?:show|ls|list)\b|\b[i]ssue\ \#?\d\b(?!\d)"""
    r"""|/[t]mp/\w""",
    flags=re.VERBOSE | re.IGNORECASE,
)


def test_no_private_path_is_left_in_a_text():
    found = []
    for file in repository_files():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not a text
        for number, line in enumerate(text.splitlines(), 1):
            if match := PRIVATE.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {match.group()!r}")
    assert not found, "\n" + "\n".join(found)


# The rules are code as well: they must bite, and bite only where they should.


def test_imports_are_found_wherever_they_hide():
    source = (
        "import os.path\n"
        "from ..routing import Routing as R\n"
        "from . import api\n"
        "def f():\n"
        "    from mixhead.nn import x, y\n"
        "    importlib.import_module('mixhead.tasks')\n"
        "    import_module('.layers')\n"
    )
    names = [i.name for i in imports_of(source, Path("f.py"), "mixhead.ops")]
    assert sorted(names) == sorted(
        ["os.path", "mixhead.routing.Routing", "mixhead.ops.api", "mixhead.nn.x", "mixhead.nn.y"]
        + ["mixhead.tasks", "mixhead.ops.layers"]
    )


@pytest.mark.parametrize(
    ("home", "wanted", "allowed"),
    [
        ("ops", "mixhead.routing.Routing", True),
        ("ops", "mixhead.routing.routers.LearnedRouter", False),
        ("ops", "mixhead.nn.x", False),
        ("ops", "transformers.AutoModel", False),
        ("nn", "mixhead.ops.head_attention", True),
        ("nn", "mixhead", False),
        ("convert", "transformers.AutoModel", True),
        ("convert", "mixhead.tasks.data", False),
        ("tasks", "mixhead.report.html", False),
        ("bench", "mixhead.report.html", False),
        ("report", "mixhead.bench.results", True),
        ("cli", "mixhead.report.html", True),
        ("cli", "mixhead.__version__", True),
        ("routing", "torch.nn", True),
        ("errors", "mixhead.routing.Routing", False),
    ],
)
def test_the_rule_itself(home, wanted, allowed):
    assert (refusal(home, wanted) is None) is allowed


@pytest.mark.parametrize(
    ("home", "wanted", "allowed"),
    [
        ("translation", "mixhead.tasks.masked_lm.train", False),
        ("translation", "mixhead.tasks.registry", False),
        ("translation", "mixhead.tasks.moa_training", True),
        ("translation", "mixhead.tasks.translation.scores", True),
        ("moa_training", "mixhead.tasks.translation.train", False),
        ("registry", "mixhead.tasks.translation.train", True),
        ("translation", "mixhead.training.run", True),
    ],
)
def test_the_rule_between_tasks_itself(home, wanted, allowed):
    assert (between_tasks(home, wanted) is None) is allowed


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("cd /wo" + "rk/main", True),
        ("see ../sha" + "red/design", True),
        ("`iss" + "ues show 2`", True),
        ("https://example.org/wo" + "rk/page", False),
        ("how the work/rest ratio is shared", False),
    ],
)
def test_the_private_pattern_itself(text, private):
    assert bool(PRIVATE.search(text)) is private
