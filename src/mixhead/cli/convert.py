"""`mixhead convert`: a model folder becomes a mixture-of-head model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixhead.cli.common import (
    DTYPE_HELP,
    MODEL_HELP,
    TEXT_HELP,
    console,
    model_folder,
    progress_bar,
    windows_of,
)
from mixhead.cli.convert_dit import CalibrationImages, convert_dit
from mixhead.errors import MixheadError
from mixhead.tasks.language_modelling.config import WINDOW


def convert(
    source: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet, unless --overwrite.")],
    active: Annotated[float, typer.Option(help="Share of all heads that a token uses, shared heads included.")] = 0.75,
    shared: Annotated[float, typer.Option(help="Share of all heads that every token uses.")] = 0.0,
    active_heads: Annotated[int | None, typer.Option(help="--active as heads of a layer, instead of a share.")] = None,
    shared_heads: Annotated[int | None, typer.Option(help="--shared as heads of a layer, instead of a share.")] = None,
    router: Annotated[str, typer.Option(help="linear, query_norm (the published recipe) or two_stage.")] = "linear",
    group_balanced: Annotated[
        bool, typer.Option("--group-balanced", help="Equally many active heads in every key-value group.")
    ] = False,
    balance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Weight of the balance loss when the model is trained; if not given 0 for the linear router and 0.01 "
            "for those of the paper, as in the tables of docs/quality.md.",
        ),
    ] = None,
    text: Annotated[str, typer.Option(help="Text to calibrate on. " + TEXT_HELP)] = "addresses:calibration",
    tokens: Annotated[int, typer.Option(min=WINDOW, help="Tokens to calibrate on.")] = 16_384,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    official: Annotated[
        str | None,
        typer.Option(
            help="SOURCE is published: `moh-llama` for the MoH-LLaMA3 folder; for a `.pth` file of MoH-ViT or a `.pt` "
            "file of MoH-DiT, which are recognised by themselves, which one it is if the file does not say so "
            "(`moh-vit-s-75`, `moh-dit-b-90`, …; a name that is none lists them all). All options but --overwrite are "
            "ignored."
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help="Images to calibrate a dense diffusion transformer on: a folder by classes, or a data set."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many of --images.")] = 256,
    vae: Annotated[Path | None, typer.Option(help="Folder of the VAE of a diffusion transformer on latents.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it exists.")] = False,
) -> None:
    """Converts a language model and, with the linear router, calibrates it (no gradients, under a minute for
    SmolLM2-135M on two cores); a dense diffusion transformer likewise. A published checkpoint becomes a model folder.
    """
    from mixhead import store
    from mixhead.convert import CalibrationConfig, MoHConfig, calibrate
    from mixhead.convert import convert as convert_model
    from mixhead.data.text import text_source
    from mixhead.interop import holds_dit, load_moh_llama, load_moh_vit
    from mixhead.models.context import window_for
    from mixhead.models.moh_dit import PUBLISHED as PUBLISHED_DIT
    from mixhead.models.moh_vit import PUBLISHED, image_processor
    from mixhead.precision import autocast_dtype

    folder = model_folder(source)
    if folder.resolve() == out.resolve():
        raise MixheadError(f"{out} is the model that is converted, which would be lost: name another folder.")
    config = MoHConfig(
        active=active,
        shared=shared,
        active_heads=active_heads,
        shared_heads=shared_heads,
        router=router,
        group_balanced=group_balanced,
        balance_coefficient=balance,
    )
    if official in PUBLISHED_DIT or holds_dit(folder):
        convert_dit(folder, out, official, config, CalibrationImages(images, samples, vae), overwrite=overwrite)
        return
    if official in PUBLISHED or folder.suffix in (".pth", ".pt"):
        store.check_target(out, overwrite=overwrite)
        classifier = load_moh_vit(folder, official)
        store.save(classifier, image_processor(classifier.config), out, overwrite=overwrite)
        console.print(f"Wrote {out}: an image classifier, {classifier.config.active_share:.1%} of its heads per token.")
        return
    if official is not None:
        if official != "moh-llama":
            raise MixheadError(
                f"--official {official} is unknown: the published formats known here are moh-llama and "
                f"{', '.join([*PUBLISHED, *PUBLISHED_DIT])}."
            )
        store.save(load_moh_llama(folder), store.load_tokenizer(folder), out, overwrite=overwrite)
        console.print(f"Wrote {out}: the published MoH-LLaMA3 as a model that routes.")
        return
    store.check_target(out, overwrite=overwrite)
    store.check_folder(folder)
    calibration = CalibrationConfig(autocast=autocast_dtype(dtype))
    documents = text_source(text, "calibration") if router == "linear" else []
    try:
        model, tokenizer = store.load_text_model(folder)
    except store.OtherKindError as error:
        raise MixheadError(f"{error} Convert and calibrate it in Python (docs/vision.md).") from None
    convert_model(model, config)
    if router == "linear":
        windows = windows_of(tokenizer, documents, window_for([model], None, WINDOW), tokens)
        with progress_bar("Calibrating") as on_progress:
            report = calibrate(model, windows.ids_WT.split(4), calibration, on_progress)
        console.print(report.to_rich())
    store.save(model, tokenizer, out, overwrite=overwrite)
    layers = model.config.moh["layers"]
    used, heads = (sum(layer[kind] for layer in layers) for kind in ("active_heads", "num_heads"))
    console.print(f"Wrote {out}: {used} of {heads} heads per token ({used / heads:.1%}), router {router}.")
