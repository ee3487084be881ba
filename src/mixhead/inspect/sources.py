"""What `mixhead inspect` shows: a recording that is there, or a new one of a model and what it is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mixhead import store
from mixhead.data.text import text_source
from mixhead.errors import MixheadError
from mixhead.inspect import TOKENS
from mixhead.inspect.record import (
    picture_files,
    record_drawing,
    record_pictures,
    record_texts,
    record_translation,
    record_writing,
)
from mixhead.recording import Recording
from mixhead.recording.file import recording_exists
from mixhead.recording.listen import routers_by_layer
from mixhead.recording.names import layer_named
from mixhead.tasks.image_classification.evaluate import load_processor
from mixhead.tasks.image_generation.sampling import class_names, load_pipeline
from mixhead.tasks.translation.translate import load_translator


@dataclass(frozen=True)
class Inputs:
    """What a model is to be shown, and what will be asked of the recording."""

    texts: Sequence[str] | None
    prompt: str | None
    images: Path | None
    draw: int | None
    tokens: int | None
    layer: str | None
    by: str | None

    def check(self, model: nn.Module, *labels: str) -> None:
        """Raises where nothing would be recorded, not that layer, or tokens with none of these labels.

        A model whose parts say more of their tokens may have others.
        """
        layers = list(routers_by_layer(model))
        if not layers:
            raise MixheadError("This model routes in no layer: convert it first (mixhead convert).")
        if self.layer is not None:
            layer_named(self.layer, layers)
        says_more = any(hasattr(module, "routing_labels") for module in model.modules())
        if self.by is not None and self.by not in labels and not says_more:
            raise MixheadError(
                f"The tokens are not grouped by {self.by!r}; they are by {', '.join(labels) or 'nothing'}."
            )


@dataclass(frozen=True)
class Recorded:
    """A recording, and the pictures that it is about."""

    recording: Recording
    pictures: Sequence[bytes] = ()


def read_or_record(source: str, inputs: Inputs, path: Path, folder_of: Callable[[str], Path]) -> Recorded:
    """The recording of that name, or a new one of the model of that name.

    Args:
        source: a recording, or a model.
        inputs: what the model is shown.
        path: NAME of a new recording.
        folder_of: from the name of a model to its folder.

    Raises:
        MixheadError: where the inputs do not fit together, or the model.
    """
    given = [name for name in ("texts", "prompt", "images", "draw") if getattr(inputs, name) is not None]
    if recording_exists(source):
        if given:
            raise MixheadError(f"{source} is a recording, which is shown as it is: leave out the texts or pictures.")
        return Recorded(Recording(source))
    if len(given) > 1:
        raise MixheadError("Give one of texts (--text), a prompt (--prompt), pictures (--images) and --draw.")
    folder = folder_of(source)
    about = {"model": model_name(source)}
    if inputs.images is not None:
        network = store.load(folder)
        processor = load_processor(folder, network)
        pictures = picture_files(inputs.images)
        inputs.check(network, *(["class"] if any(pictures.values()) else []))
        return Recorded(*record_pictures(network, processor, pictures, path, about=about))
    if inputs.draw is not None:
        pipeline = load_pipeline(folder)
        count = len(class_names(pipeline))
        classes = [number % count for number in range(inputs.draw)]
        inputs.check(pipeline.transformer.dit)
        return Recorded(*record_drawing(pipeline, classes, path, about=about))
    return record_of_text(folder, inputs, path, about)


def record_of_text(folder: Path, inputs: Inputs, path: Path, about: dict[str, str]) -> Recorded:
    """What a model of text uses while it reads, translates or goes on."""
    named = dict(name_and_text(text) for text in inputs.texts or ["addresses:test"])
    labels = (*(["text"] if len(named) > 1 else []), "word class", "part of speech", "position")
    if store.load_config(store.check_folder(folder)).is_encoder_decoder:
        if inputs.prompt is not None:
            raise MixheadError(f"{folder} translates and continues no prompt: give it a text (--text).")
        translator = load_translator(folder)
        inputs.check(translator[0], *labels)
        return Recorded(record_translation(*translator, named, path, most_tokens=inputs.tokens or TOKENS, about=about))
    model, tokenizer = (store.load_text_model if inputs.prompt is None else store.load_causal_lm)(folder)
    inputs.check(model, *labels)
    if inputs.prompt is not None:
        written = record_writing(model, tokenizer, inputs.prompt, path, new_tokens=inputs.tokens, about=about)
        return Recorded(written)
    return Recorded(record_texts(model, tokenizer, named, path, most_tokens=inputs.tokens or TOKENS, about=about))


def model_name(source: str) -> str:
    """What a model or a recording is called; the folder `model` of a training run is called like the run."""
    path = Path(source).resolve()
    return path.parent.name if path.name == "model" else path.name


def name_and_text(given: str) -> tuple[str, list[str]]:
    """`NAME=text`, or a text that is named by itself."""
    name, equals, text = given.partition("=")
    return name, text_source(text if equals else given, "test")
