"""How the C++ kernels are compiled, kept and loaded."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mixhead.errors import MixheadError
from mixhead.ops import cpu, head_attention
from mixhead.ops.attention import reference
from mixhead.ops.cpu import compiling, loading
from mixhead.routing import Routing


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has loaded nothing, and a cache of its own."""
    monkeypatch.setenv("MIXHEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "_outcomes", {})
    monkeypatch.setattr(loading, "PACKAGED", tmp_path / "no package")
    return tmp_path / "cache"


@pytest.fixture
def made(monkeypatch):
    """Stands in for the compiler, which takes some seconds, and counts the libraries that it links."""
    runs = []

    def pretend(command, **_):
        if "-shared" in command:
            runs.append(command)
        Path(command[-1]).write_bytes(b"a library")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(compiling.subprocess, "run", pretend)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name)
    return runs


def test_the_cache_is_used_again(fresh, made):
    assert compiling.library("attention", "plain") == compiling.library("attention", "plain")
    assert len(made) == 1
    assert sorted(f.suffix for f in (fresh / "kernels").iterdir()) == [".lock", ".sha256", ".so"]


@pytest.mark.parametrize("damage", ["truncated", "changed", "without checksum", "checksum of other bytes"])
def test_a_damaged_cache_is_built_anew(fresh, made, damage):
    path = compiling.library("attention", "plain")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:4])
    elif damage == "changed":
        path.write_bytes(b"something")
    elif damage == "checksum of other bytes":
        path.with_suffix(".sha256").write_bytes(b"\x8e\xff" * 32)
    else:
        path.with_suffix(".sha256").unlink()
    assert compiling.library("attention", "plain") == path
    assert path.read_bytes() == b"a library"
    assert len(made) == 2


def test_each_instruction_set_has_its_own_build(fresh, made):
    assert len({compiling.library("attention", level) for level in compiling.FLAGS_OF_LEVEL}) == len(
        compiling.FLAGS_OF_LEVEL
    )


def test_machines_that_share_a_cache_have_their_own_builds(fresh, made, monkeypatch):
    """A build runs on every machine whose builds it is found by: none is made for the machine at hand alone."""
    here = compiling.library("attention", "plain")
    for name, other in (("machine", lambda: "riscv64"), ("libc_ver", lambda: ("glibc", "2.17"))):
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(compiling.platform, name, other)
            assert compiling.library("attention", "plain") != here
    assert compiling.library("attention", "plain") == here
    assert not any(
        "native" in argument for level in compiling.FLAGS_OF_LEVEL for argument in compiling.compile_command(level)
    )


def test_a_build_that_was_interrupted_is_begun_anew(fresh, made):
    path = compiling.library("attention", "plain")
    path.unlink()  # the checksum appears before the library
    (path.parent / "building-killed").mkdir()
    (path.parent / "building-killed" / "kernel.so").write_bytes(b"half")
    assert compiling.library("attention", "plain") == path
    assert path.read_bytes() == b"a library"


def test_one_process_builds_while_the_others_wait(fresh, made):
    start = threading.Barrier(4)

    def one(_):
        start.wait()
        return compiling.library("attention", "plain")

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(one, range(4)))) == 1
    assert len(made) == 1


def failing(caplog):
    """Nothing can be loaded: portable PyTorch gives the result, and one line is logged. Returns the reason."""
    with caplog.at_level(logging.WARNING, logger=loading.__name__):
        for name in (*compiling.LIBRARIES, *compiling.LIBRARIES):
            built, reason = cpu.available(name)
            assert not built
        q, k, v = torch.randn(3, 2, 4, 20, 64)
        selected = torch.rand(2, 20, 4) < 0.5
        gates = torch.rand(2, 20, 4) * selected
        routing = Routing(gates, selected)
        expected = reference.attend(q, k, v, routing, causal=False, scale=0.125, attn_mask=None)
        torch.testing.assert_close(head_attention(q, k, v, routing), expected)
        with pytest.raises(MixheadError, match=r"impl='cpu' cannot take these arguments: .* is not available"):
            head_attention(q, k, v, routing, impl="cpu")
    warnings = [r.getMessage() for r in caplog.records if r.name == loading.__name__]
    assert len(warnings) == 1, warnings
    return reason


def test_without_a_compiler(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in failing(caplog)


def test_a_compiler_that_fails(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "false")
    assert "false failed" in failing(caplog)


def test_a_cache_that_cannot_be_written(fresh, caplog):
    fresh.write_text("a file where the folder should be")
    assert "cannot be kept" in failing(caplog)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no compiler")
def test_it_builds_where_there_is_a_compiler():
    """Without this, a kernel that does not compile would only be skipped."""
    built, why_not = cpu.available()
    assert built, why_not


def test_a_compiler_that_is_no_program(fresh, monkeypatch, caplog, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_bytes(b"\x7fELF but no program")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "could not be run" in failing(caplog)


def test_a_compiler_with_arguments(fresh, made, monkeypatch):
    monkeypatch.setenv("CXX", "ccache g++ -pipe")
    compiling.library("attention", "plain")
    assert made[0][:3] == ["ccache", "g++", "-pipe"]


def test_a_compiler_that_cannot_be_read(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "'g++")
    assert "CXX cannot be read as a command" in failing(caplog)


# What is loaded.


@pytest.fixture
def loads(monkeypatch):
    """Stands in for PyTorch's loading: only files that hold "a library" load. Returns the paths that were tried."""
    tried = []

    def load_library(path):
        tried.append(Path(path))
        if Path(path).read_bytes() != b"a library":
            raise OSError("invalid ELF header")

    monkeypatch.setattr(loading.torch.ops, "load_library", load_library)
    return tried


def test_only_what_is_asked_for_is_compiled(fresh, made, loads):
    assert cpu.available()[0]
    assert [path.name.split("-")[0] for path in loads] == ["attention"]
    assert cpu.available("projections")[0]
    assert len(made) == len(loads) == 2


def test_a_whole_library_that_does_not_load_is_compiled_once_more(fresh, made, loads):
    """As from another machine: its checksum is right."""
    path = compiling.library("attention", cpu.best_level())
    path.write_bytes(b"of another machine")
    path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    assert cpu.available()[0]
    assert len(made) == 2
    assert path.read_bytes() == b"a library"


def test_what_was_just_compiled_and_does_not_load(fresh, made, monkeypatch, caplog):
    def load_library(path):
        raise OSError("undefined symbol")

    monkeypatch.setattr(loading.torch.ops, "load_library", load_library)
    with caplog.at_level(logging.WARNING, logger=loading.__name__):
        built, reason = cpu.available()
    assert not built
    assert "does not load (undefined symbol)" in reason
    assert len(made) == 2
    assert len([r for r in caplog.records if r.name == loading.__name__]) == 1


@pytest.mark.parametrize("whole", [True, False])
def test_a_kernel_in_the_package_comes_first(fresh, made, loads, monkeypatch, tmp_path, caplog, whole):
    monkeypatch.setattr(loading, "PACKAGED", tmp_path)
    packaged = tmp_path / f"kernels-{cpu.best_level()}.so"
    packaged.write_bytes(b"a library" if whole else b"of another machine")
    with caplog.at_level(logging.WARNING, logger=loading.__name__):
        assert cpu.available()[0]
    assert loads[0] == packaged
    assert len(made) == (0 if whole else 1)
    lines = [r.getMessage() for r in caplog.records if r.name == loading.__name__]
    assert len(lines) == (0 if whole else 1)
    assert whole or "It is compiled instead." in lines[0]


def test_nothing_is_compiled_at_import(tmp_path):
    environment = {**os.environ, "MIXHEAD_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", "import mixhead.ops"], env=environment, check=True, timeout=300)
    assert list(tmp_path.iterdir()) == []
