"""What `mixhead convert` does with a diffusion transformer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mixhead.cli.common import console, progress_bar
from mixhead.errors import MixheadError

if TYPE_CHECKING:
    from mixhead.convert import MoHConfig
    from mixhead.models.moh_dit import MoHDiT


PROBES = 8  # images that tell how sensitive a layer is: one has a single time step


@dataclass(frozen=True)
class CalibrationImages:
    """Where to calibrate: `where` is a data set's name or a folder, None to leave a dense model dense."""

    where: str | None
    count: int
    vae: Path | None


def convert_dit(
    source: Path, out: Path, name: str | None, config: MoHConfig, images: CalibrationImages, *, overwrite: bool
) -> None:
    """Writes a pipeline's folder: a published or mixture-of-head model as it is, a dense one converted where there are
    images to calibrate on.
    """
    from mixhead import store
    from mixhead.models.moh_dit import MoHDiTPipeline, MoHDiTTransformer2DModel
    from mixhead.tasks.image_generation.sampling import load_pipeline

    store.check_target(out, overwrite=overwrite)
    pipeline = load_pipeline(source, images.vae, name)
    dit = pipeline.transformer.dit
    if images.where is not None:
        if dit.config.shared_heads is not None:
            raise MixheadError(f"{source} is mixture-of-head already: --images is for a dense DiT.")
        convert_calibrated(dit, config, images, pipeline.vae)
    labels = pipeline.config.id2label
    converted = MoHDiTPipeline(MoHDiTTransformer2DModel.from_dit(dit), pipeline.scheduler, pipeline.vae, labels)
    store.save(converted, None, out, overwrite=overwrite)
    dense = "" if dit.config.shared_heads is not None else " It is dense: --images NAME makes it mixture-of-head."
    console.print(f"Wrote {out}: a diffusion transformer, {dit.config.active_share:.1%} of its heads per token.{dense}")


def convert_calibrated(dit: MoHDiT, config: MoHConfig, images: CalibrationImages, vae: object | None) -> None:
    """A dense DiT becomes mixture-of-head and, with the linear router, is calibrated on noised images."""
    from mixhead.convert import CalibrationConfig, calibrate, noised_batches
    from mixhead.convert import convert as convert_model
    from mixhead.data.labelled_images import open_images
    from mixhead.tasks.image_generation.calibration_images import calibration_samples

    assert images.where is not None
    samples, classes = calibration_samples(open_images(images.where), dit.config, vae, images.count)
    convert_model(dit, config)
    if config.router != "linear":
        return
    null_share = 0.1 if dit.config.null_class else 0.0
    batches = noised_batches(samples, classes, dit.config.num_classes, null_share=null_share)
    with progress_bar("Calibrating") as on_progress:
        report = calibrate(dit, batches, CalibrationConfig(probe_sequences=PROBES), on_progress)
    console.print(report.to_rich())
