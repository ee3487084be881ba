"""Records which heads a model uses for texts, for what it writes, or for pictures."""

from __future__ import annotations

import io
import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixhead.data.image_files import SUFFIXES, image_files, read_image
from mixhead.data.token_text import pieces_of
from mixhead.data.windows import document_windows, prompt_ids
from mixhead.errors import MixheadError
from mixhead.models.context import check_ids, window_for
from mixhead.models.hugging_face import MoHModelMixin
from mixhead.models.patches import GRIDS, patch_grid
from mixhead.recording import Recording, RoutingLog, record_routing
from mixhead.tasks.image_generation.sampling import class_names, sample_images
from mixhead.tasks.image_generation.sampling_config import SamplingConfig
from mixhead.tasks.translation.config import TranslateConfig
from mixhead.tasks.translation.translate import clean, most_new_tokens, room_for_source, split_long

if TYPE_CHECKING:
    from mixhead.models.moh_dit import MoHDiTPipeline

logger = logging.getLogger(__name__)

LONGEST = 2048  # tokens of one window
NEW_TOKENS = 100


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
        model: a language model that routes.
        tokenizer: of the model.
        texts: documents by the name of what they belong to; tokens of several names are labelled `text`.
        path: NAME of the recording.
        most_tokens: how many tokens of each name are read.
        about: what the recording shall remember.

    Raises:
        MixheadError: where a text holds no token, or one that the model does not know.
    """
    window = window_for([model], None, LONGEST)
    windows = {name: _windows(tokenizer, name, documents, window, most_tokens) for name, documents in texts.items()}
    for ids_1N in itertools.chain.from_iterable(windows.values()):
        check_ids(model, ids_1N)
    with record_routing(model, path) as log:
        log.about.update({**heads_that_do_not_route(model), **(about or {})})
        for name, of_name in windows.items():
            with log.labelled(**({"text": name} if len(texts) > 1 else {})):
                for ids_1N in of_name:
                    model(input_ids=ids_1N.to(model.device), use_cache=False)
        _name_tokens(
            log, tokenizer, (token for of in windows.values() for ids_1N in of for token in ids_1N[0].tolist())
        )
    return Recording(path)


def heads_that_do_not_route(model: nn.Module) -> dict[str, int]:
    """How many heads a converted model has in layers that stayed dense, for the recording to remember."""
    if not isinstance(model, MoHModelMixin):
        return {}
    layers = model.config.moh["layers"]
    return {"dense_heads": sum(of["num_heads"] for of in layers if of["active_heads"] == of["num_heads"])}


def _sentences(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], most_tokens: int) -> Iterator[str]:
    """Lines, cut behind the ends of sentences, none too long to be translated."""
    for document in documents:
        for sentence in re.split(r"(?<=[.!?])\s+|\n", document):
            yield from split_long(tokenizer, clean(sentence), most_tokens)


def _windows(
    tokenizer: PreTrainedTokenizerBase, name: str, documents: Iterable[str], window: int, most: int
) -> list[Tensor]:
    """The first windows of the documents, int64 [1, N] each, `most` tokens in all."""
    return _first_tokens(name, (ids for text in documents for ids in document_windows(tokenizer, text, window)), most)


def _first_tokens(name: str, parts: Iterable[list[int]], most: int) -> list[Tensor]:
    """The first parts, `most` tokens in all, int64 [1, N] each."""
    found: list[Tensor] = []
    for ids in parts:
        found.append(torch.tensor([ids[:most]]))
        most -= len(ids)
        if most <= 0:
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
    new_tokens: int | None = None,
    about: Mapping[str, Any] | None = None,
) -> Recording:
    """Lets a model continue a prompt and writes what each token used, those of the prompt too.

    The last token that it writes has used no head yet, so it is not part of the recording.

    Args:
        model: a causal language model that routes.
        tokenizer: of the model.
        prompt: the text to continue.
        path: NAME of the recording.
        new_tokens: how many to write, at most; None for 100, or as many as there is room for.
        about: what the recording shall remember.

    Raises:
        MixheadError: where the prompt holds no token, or the model has no room for it and the new tokens.
    """
    inputs, new_tokens = prompt_ids(model, tokenizer, prompt, new_tokens, NEW_TOKENS)
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
    longest = room_for_source(model, TranslateConfig().max_source_tokens)
    lines_by_name = {
        name: _first_tokens(
            name,
            (tokenizer(text, verbose=False)["input_ids"] for text in _sentences(tokenizer, documents, longest)),
            most_tokens,
        )
        for name, documents in texts.items()
    }
    for ids_1N in itertools.chain.from_iterable(lines_by_name.values()):
        check_ids(model, ids_1N)
    seen: set[int] = set()
    with record_routing(model, path) as log:
        log.about.update({**heads_that_do_not_route(model), **(about or {})})
        for name, lines in lines_by_name.items():
            with log.labelled(**({"text": name} if len(texts) > 1 else {})):
                for ids_1N in lines:
                    out_1N = model.generate(
                        input_ids=ids_1N.to(model.device),
                        num_beams=1,
                        do_sample=False,
                        max_new_tokens=most_new_tokens(model, ids_1N.shape[1]),
                    )
                    seen |= {*ids_1N[0].tolist(), *out_1N[0].tolist()}
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
    """Shows pictures to a model and writes what each patch used. What cannot be read is left out, and logged.

    Args:
        model: a model of images that routes.
        processor: makes `pixel_values` of pictures.
        pictures: files, with the class of each; "" where there is none.
        path: NAME of the recording.
        about: what the recording shall remember.

    Returns:
        The recording, and the pictures as the model saw them, PNG.

    Raises:
        MixheadError: where none of the pictures can be read.
    """
    shown = []
    grids: list[list[int]] = []  # of the finest map of each picture
    with record_routing(model, path) as log:
        log.about.update({**heads_that_do_not_route(model), **(about or {}), GRIDS: grids})
        for file, of_class in pictures.items():
            try:
                picture = read_image(file)
            except MixheadError as error:
                logger.warning("Left out: %s", error)
                continue
            pixels_1CYX = processor(picture, return_tensors="pt")["pixel_values"]
            with log.labelled(**({"class": of_class} if of_class else {})):
                model(pixels_1CYX)
            grids.append(
                [*patch_grid(getattr(model, "config", None), pixels_1CYX.shape[-2:], pixels_1CYX[0, 0].numel())]
            )
            shown.append(_seen(pixels_1CYX[0], processor))
        if not shown:
            raise MixheadError(f"None of the {len(pictures)} pictures can be read.")
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
    if not folder.is_dir():
        raise MixheadError(f"There is no picture or folder of pictures {folder}.")
    files = image_files(folder)
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
