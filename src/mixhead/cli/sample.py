"""`mixhead sample`: draws images of classes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixhead.cli.common import console, progress_bar
from mixhead.tasks.image_generation.sampling_config import SamplingConfig

DEFAULTS = SamplingConfig()


def sample(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model, or of the run that trained it.")],
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="Class by number or name; may be given several times. All by default."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Images; they take the classes in turn.")] = 64,
    steps: Annotated[int, typer.Option(help="Steps of the sampler.")] = DEFAULTS.steps,
    guidance: Annotated[
        float, typer.Option(help="Classifier-free guidance: 1 is none, more makes images more typical.")
    ] = 1.5,
    sampler: Annotated[
        str, typer.Option(help="ddim, dpm (DPM-Solver++) or ancestral (the published one, 250 steps).")
    ] = DEFAULTS.sampler,
    seed: Annotated[int, typer.Option(help="Of the noise: the same seed draws the same images.")] = DEFAULTS.seed,
    batch_size: Annotated[
        int, typer.Option(help="Images that are finished and written together; they do not depend on it.")
    ] = DEFAULTS.batch_size,
    vae: Annotated[
        Path | None, typer.Option(help="Folder of a VAE, for a model of latents that was saved without one.")
    ] = None,
    columns: Annotated[int | None, typer.Option(min=1, help="Columns of the grid; nearly square by default.")] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="The grid; the single images go into a folder of the same name.")
    ] = Path("grid.png"),
) -> None:
    """Draws images, each from its own noise; an interrupted call goes on where it was when it is repeated.

    Several processes share the images: `torchrun --nproc_per_node 2 -m -- mixhead.cli sample MODEL --n 64`.
    """
    from mixhead.tasks.image_generation.drawing import GRID, draw_folder, write_grid
    from mixhead.tasks.image_generation.sampling import class_names, class_number, load_pipeline

    config = SamplingConfig(
        steps=steps,
        guidance=guidance,
        sampler=sampler,  # type: ignore[arg-type]
        seed=seed,
        batch_size=batch_size,
    )
    pipeline = load_pipeline(model, vae)
    names = class_names(pipeline)
    numbers = [class_number(names, wanted) for wanted in classes or map(str, range(len(names)))]
    labels = [numbers[i % len(numbers)] for i in range(n)]
    folder = out.with_suffix("")
    with progress_bar("Drawing") as on_progress:
        files = draw_folder(pipeline, labels, config, folder, model, on_progress)
    if files:
        write_grid(files, out, columns)
        shown = f"the first {GRID} of them" if n > GRID else "all of them"
        console.print(f"{n} images are in {folder}, {shown} in {out}.", markup=False, highlight=False)
