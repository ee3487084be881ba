"""Records which heads a model uses for texts, for what it writes, or for pictures."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixhead.data.image_files import SUFFIXES, read_image
from mixhead.data.token_text import pieces_of
from mixhead.errors import MixheadError
from mixhead.models.hugging_face import MoHModelMixin
from mixhead.recording import Recording, RoutingLog, record_routing
from mixhead.tasks.image_generation.sampling import class_names, sample_images
from mixhead.tasks.image_generation.sampling_config import SamplingConfig
from mixhead.tasks.translation.config import TranslateConfig
from mixhead.tasks.translation.translate import clean, split_long

if TYPE_CHECKING:
    from mixhead.models.moh_dit import MoHDiTPipeline

LONGEST = 2048  # tokens of one window


@torch.inference_mode()
def record_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    path: Path,
    *,
    most_tokens: int = 2000,
    about: Mapping[str, Any] | None = None,
) -> Recording:
    """Reads texts with a model and writes what each token used.

    Args:
        model: a causal language model that routes.
        tokenizer: of the model.
        texts: documents by the name of what they belong to; tokens of several names are labelled `text`.
        path: NAME of the recording.
        most_tokens: how many tokens of each name are read.
        about: what the recording shall remember.

    Raises:
        MixheadError: where a text holds no token.
    """
    ids_by_name = {name: _ids(tokenizer, name, documents, most_tokens) for name, documents in texts.items()}
    with record_routing(model, path) as log:
        log.about.update({**heads_that_do_not_route(model), **(about or {})})
        for name, documents in ids_by_name.items():
            with log.labelled(**({"text": name} if len(texts) > 1 else {})):
                for ids in documents:
                    for start in range(0, len(ids), LONGEST):
                        model(input_ids=torch.tensor([ids[start : start + LONGEST]]), use_cache=False)
        _name_tokens(
            log, tokenizer, (token for documents in ids_by_name.values() for ids in documents for token in ids)
        )
    return Recording(path)


def heads_that_do_not_route(model: nn.Module) -> dict[str, int]:
    """How many heads a converted model has in layers that stayed dense, for the recording to remember."""
    if not isinstance(model, MoHModelMixin):
        return {}
    layers = model.config.moh["layers"]
    return {"dense_heads": sum(of["num_heads"] for of in layers if of["active_heads"] == of["num_heads"])}


def _sentences(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Iterator[str]:
    """Lines, cut behind the ends of sentences, none too long to be translated."""
    for document in documents:
        for sentence in re.split(r"(?<=[.!?])\s+|\n", document):
            yield from split_long(tokenizer, clean(sentence), TranslateConfig().max_source_tokens)


def _ids(tokenizer: PreTrainedTokenizerBase, name: str, documents: Iterable[str], most: int) -> list[list[int]]:
    """The tokens of the first documents, `most` in all."""
    found: list[list[int]] = []
    left = most
    for text in documents:
        ids = tokenizer(text, verbose=False)["input_ids"][:left]
        left -= len(ids)
        if ids:
            found.append(ids)
        if left <= 0:
            break
    if not found:
        raise MixheadError(f"The text {name!r} holds no token: give one that says something.")
    return found


@torch.inference_mode()
def record_writing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    path: Path,
    *,
    new_tokens: int = 100,
    about: Mapping[str, Any] | None = None,
) -> Recording:
    """Lets a model continue a prompt and writes what each token used, those of the prompt too.

    The last token that it writes has used no head yet, so it is not part of the recording.
    """
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise MixheadError("The prompt holds no token: give one that says something.")
    with record_routing(model, path) as log:
        log.about.update({**heads_that_do_not_route(model), **(about or {})})
        ids_BN = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        _name_tokens(log, tokenizer, ids_BN.flatten().tolist())
    return Recording(path)


@torch.inference_mode()
def record_translation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    path: Path,
    *,
    most_tokens: int = 1000,
    about: Mapping[str, Any] | None = None,
) -> Recording:
    """Translates texts, sentence by sentence and always with the likeliest token, and writes what each token used.

    Args:
        model: an encoder-decoder that routes.
        tokenizer: of the model.
        texts: documents by the name of what they belong to; tokens of several names are labelled `text`.
        path: NAME of the recording.
        most_tokens: how many source tokens of each name are translated.
        about: what the recording shall remember.

    Raises:
        MixheadError: where a text holds no token.
    """
    ids_by_name = {
        name: _ids(tokenizer, name, _sentences(tokenizer, documents), most_tokens) for name, documents in texts.items()
    }
    seen: set[int] = set()
    with record_routing(model, path) as log:
        log.about.update({**heads_that_do_not_route(model), **(about or {})})
        for name, lines in ids_by_name.items():
            with log.labelled(**({"text": name} if len(texts) > 1 else {})):
                for ids in lines:
                    out_1N = model.generate(
                        input_ids=torch.tensor([ids]), num_beams=1, do_sample=False, max_new_tokens=2 * len(ids) + 16
                    )
                    seen |= {*ids, *out_1N[0].tolist()}
        _name_tokens(log, tokenizer, seen)
    return Recording(path)


def _name_tokens(log: RoutingLog, tokenizer: PreTrainedTokenizerBase, ids: Any) -> None:
    log.names["token"] = pieces_of(tokenizer, ids)


@torch.inference_mode()
def record_pictures(
    model: nn.Module,
    processor: Any,
    pictures: Mapping[Path, str],
    path: Path,
    *,
    about: Mapping[str, Any] | None = None,
) -> tuple[Recording, list[bytes]]:
    """Shows pictures to a model and writes what each patch used.

    Args:
        model: a model of images that routes.
        processor: makes `pixel_values` of pictures.
        pictures: files, with the class of each; "" where there is none.
        path: NAME of the recording.
        about: what the recording shall remember.

    Returns:
        The recording, and the pictures as the model saw them, PNG.
    """
    shown = []
    with record_routing(model, path) as log:
        log.about.update({**heads_that_do_not_route(model), **(about or {})})
        for file, of_class in pictures.items():
            pixels_1CYX = processor(read_image(file), return_tensors="pt")["pixel_values"]
            with log.labelled(**({"class": of_class} if of_class else {})):
                model(pixels_1CYX)
            shown.append(_seen(pixels_1CYX[0], processor))
    return Recording(path), shown


def record_drawing(
    pipeline: MoHDiTPipeline,
    classes: Sequence[int],
    path: Path,
    *,
    steps: int = 10,
    about: Mapping[str, Any] | None = None,
) -> tuple[Recording, list[bytes]]:
    """Lets a diffusion model draw an image of each class and writes what each patch used at each time step.

    Args:
        pipeline: a trained MoH-DiT.
        classes: a class for each image; they are drawn together, without guidance.
        path: NAME of the recording.
        steps: time steps.
        about: what the recording shall remember.

    Returns:
        The recording, and the finished images, PNG.
    """
    config = SamplingConfig(steps=steps, group=len(classes), batch_size=len(classes))
    with record_routing(pipeline.transformer.dit, path) as log:
        log.about.update(about or {})
        log.names["class"] = dict(enumerate(class_names(pipeline)))
        images_BCYX = torch.cat([*sample_images(pipeline, classes, config)])
    return Recording(path), [png_of(image_CYX) for image_CYX in images_BCYX]


def picture_files(folder: Path, most_of_each: int = 50) -> dict[Path, str]:
    """The pictures of a folder, and the class of each: the name of its subfolder, where there are subfolders.

    Raises:
        MixheadError: where there is no picture.
    """
    if folder.is_file():
        return {folder: ""}
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES]
    by_class: dict[str, list[Path]] = {}
    for file in files:
        by_class.setdefault("" if file.parent == folder else file.relative_to(folder).parts[0], []).append(file)
    if not files:
        raise MixheadError(f"{folder} holds no picture ({', '.join(sorted(SUFFIXES))}).")
    return {file: name for name, of in by_class.items() for file in of[:most_of_each]}


def _seen(pixels_CYX: Tensor, processor: Any) -> bytes:
    """The picture that the model saw, its normalisation undone."""
    mean = torch.tensor(getattr(processor, "image_mean", None) or [0.0]).view(-1, 1, 1)
    deviation = torch.tensor(getattr(processor, "image_std", None) or [1.0]).view(-1, 1, 1)
    return png_of(((pixels_CYX * deviation + mean).clamp(0, 1) * 255).round().byte())


def png_of(levels_CYX: Tensor) -> bytes:
    """A picture, uint8 [1 or 3, Y, X], as the bytes of a PNG file."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(levels_CYX.permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()).save(out, "PNG", optimize=True)
    return out.getvalue()
