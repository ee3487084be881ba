"""Saving a model folder so that it is complete or absent, and loading one with a sentence for all that can be wrong."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from mixhead.errors import MixheadError, first_line, listed
from mixhead.files import read_json, restore, write_folder
from mixhead.interop.safe_load import read_start
from mixhead.models.auto import LoadsItsModels
from mixhead.models.context import check_reads_forward
from mixhead.models.hugging_face import MoHModelMixin, moh_model_class
from mixhead.shards import check_indexes

PathLike = str | os.PathLike[str]

CONFIG = "config.json"
PIPELINE = "model_index.json"  # of diffusers
WEIGHT_FILES = ("*.safetensors", "*.bin")
# What there is for models that write no text, by the end of the name of their class.
OTHER_KINDS = {
    "ForMaskedLM": "it fills gaps, and sees the words on both sides of them (`mixhead fill-mask`)",
    "ForImageClassification": "it looks at images (`mixhead classify`, `mixhead evaluate-images`)",
    "ForConditionalGeneration": "it reads one thing and writes another (`mixhead translate`)",
    "MTModel": "it reads one thing and writes another (`mixhead translate`)",
}
# What the writers raise when a disk is full or a folder read-only: the operating system and safetensors.
WRITE_ERRORS = (OSError, SafetensorError)


class OtherKindError(MixheadError):
    """A folder holds another kind of model than is wanted."""


class Saveable(Protocol):
    """What writes itself into a folder."""

    def save_pretrained(self, save_directory: Any, /) -> Any: ...


def save(
    model: Saveable,
    tokenizer: PreTrainedTokenizerBase | ImageProcessingMixin | None,
    path: PathLike,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a model, its tokenizer or image processor beside it, under a temporary name; renames the whole folder.

    Args:
        model: any model of transformers, converted or not, or a pipeline of diffusers.
        tokenizer: or image processor, saved into the same folder; None if there is none.
        path: the folder to make. An empty one is taken as well.
        overwrite: whether a model folder that stands there may be replaced; nothing else ever is.

    Raises:
        MixheadError: where the folder is taken or cannot be written, or the model cannot be saved as it is; what stood
            there before then still does.
    """
    target = check_target(path, overwrite=overwrite)
    forget_unpacked(model)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for file in folder.rglob("*"):
            flush_to_disk(file)

    try:
        write_folder(target, write)
    except WRITE_ERRORS as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise MixheadError(f"{target} could not be written: {reason}. Nothing of it was left behind.") from error
    except MixheadError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:  # of weights that have no form in a file
        raise MixheadError(
            f"This {type(model).__name__} cannot be saved ({first_line(error)}): load it without quantisation first, a "
            "GGUF file with dequantize=True."
        ) from error


def forget_unpacked(model: Any) -> None:
    """A model from a GGUF file whose weights were unpacked at loading is plain, and no longer called quantised."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, GgufHfQuantizer) and not quantizer.packed_modules:
        quantizer.remove_quantization_config(model)


def check_target(path: PathLike, *, overwrite: bool = False) -> Path:
    """The absolute path of a folder that `save` may write.

    Raises:
        MixheadError: where it may not; asked before hours of work, not after.
    """
    target = Path(path).resolve()
    above = next(parent for parent in target.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        why = "is read-only" if above.is_dir() else "is a file"
        raise MixheadError(f"{target} cannot be made, since {above} {why}: name a folder elsewhere.")
    restore(target)
    if not target.exists():
        return target
    if not target.is_dir():
        raise MixheadError(f"{target} exists and is a file: name a folder that does not exist yet.")
    if not any(target.iterdir()):
        return target
    if not overwrite:
        raise MixheadError(
            f"{target} exists and is not empty: name another folder, or replace it with --overwrite (overwrite=True)."
        )
    if not any((target / name).is_file() for name in (CONFIG, PIPELINE)):
        raise MixheadError(f"{target} holds no model ({CONFIG} is missing), so it will not be overwritten.")
    return target


def flush_to_disk(file: Path) -> None:
    """Waits until a file's bytes are on the disk: only then may its folder take the place of an older one."""
    if not file.is_file():
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: PathLike, *, dtype: Any = "auto") -> PreTrainedModel:
    """Loads a model folder, converted or not, as the class that it was saved from.

    Nothing in the folder is executed: weights are read by safetensors or PyTorch's restricted unpickler, and code that
    a folder brings along is refused.

    Args:
        path: a folder with `config.json` and weights.
        dtype: dtype of the weights; by default the one that they were saved in.

    Raises:
        MixheadError: where a file is missing, truncated or corrupt, or does not fit the others.
    """
    folder = check_folder(path)
    config = load_config(folder)
    return load_as(model_class_of(folder, config), folder, config, dtype)


def load_causal_lm(path: PathLike, *, dtype: Any = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model, converted or not, with its tokenizer.

    Raises:
        MixheadError: as `load` does, and where the folder holds a model of another kind.
    """
    folder = check_folder(path)
    config = load_config(folder)
    check_writes_text(folder, config)
    return load_as(AutoModelForCausalLM, folder, config, dtype), load_tokenizer(folder)


def load_text_model(path: PathLike, *, dtype: Any = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model that reads text alone, causal, masked or without a head, as the class that it was saved from.

    Its tokenizer comes with it. Raises as `load_causal_lm` does.
    """
    folder = check_folder(path)
    config = load_config(folder)
    if not stays_what_it_is(config):
        return load_causal_lm(folder, dtype=dtype)
    return load_as(model_class_of(folder, config), folder, config, dtype), load_tokenizer(folder)


def stays_what_it_is(config: PreTrainedConfig) -> bool:
    """Whether a configuration names a model of text that is no causal language model: a masked one, or a bare one."""
    name = architecture_of(config)
    if name in names_of(MODEL_FOR_MASKED_LM_MAPPING_NAMES):
        return True
    bare = name in names_of(MODEL_MAPPING_NAMES) and not config.sub_configs and not config.is_encoder_decoder
    return bare and getattr(getattr(transformers, name, None), "main_input_name", None) == "input_ids"


def outline(path: PathLike) -> PreTrainedModel:
    """A causal language model without its weights, on the device "meta": enough to refuse it before work begins.

    Raises:
        MixheadError: where the folder holds none, or lacks weights or a tokenizer.
    """
    folder = check_folder(path)
    config = load_config(folder)
    check_writes_text(folder, config)
    check_weight_files(folder)
    for file in folder.glob("*.safetensors"):
        or_refuse(partial(check_size, file), f"{file} is truncated or corrupt")
    load_tokenizer(folder)
    with torch.device("meta"):
        model = or_refuse(
            lambda: AutoModelForCausalLM.from_config(config), f"{folder / CONFIG} describes no model that can be built"
        )
    check_reads_forward(model)
    return model


def check_size(file: Path) -> None:
    """Raises where a file of weights is not as long as its header says; no weight is read."""
    with safe_open(file, "pt"):
        pass


def architecture_of(config: PreTrainedConfig) -> str:
    """The class that a model was saved from, by its name; "" where the configuration does not say."""
    name = next(iter(config.architectures or ()), "")
    if not isinstance(config.architectures or [], list) or not isinstance(name, str):
        raise MixheadError(f"The configuration names {config.architectures!r} as its architectures: a list of names.")
    return name.removeprefix("MoH") if hasattr(config, "base_config_class") else name


def names_of(mapping: Mapping[str, Any]) -> set[str]:
    """The model classes that a mapping of transformers names, of which some types have several."""
    return {name for names in mapping.values() for name in ((names,) if isinstance(names, str) else names)}


def check_writes_text(folder: Path, config: PreTrainedConfig) -> None:
    """Raises where a folder holds no causal language model: loaded as one, it would lack its head or see ahead."""
    name = architecture_of(config)
    known = type(config) in AutoModelForCausalLM._model_mapping
    # A bare model is tried, since it has all weights where it ties them.
    if known and (not name or name in names_of(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) or name.endswith("Model")):
        return
    if known and not hasattr(transformers, name):
        return
    raise OtherKindError(
        f"{folder} holds {name or f'a model of type {config.model_type}'}, which is no causal language model"
        + next((f": {hint}" for end, hint in OTHER_KINDS.items() if name.endswith(end)), "")
        + "."
    )


def load_tokenizer(path: PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder."""
    folder = check_folder(path)
    return or_refuse(
        lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
        f"{folder} has no tokenizer that can be read",
    )


def check_folder(path: PathLike) -> Path:
    """The folder, if there is one with a configuration in it."""
    folder = Path(path)
    restore(folder)
    if not folder.exists():
        raise MixheadError(f"There is no model folder {folder}.")
    if not folder.is_dir():
        raise MixheadError(f"{folder} is a file, but a model folder with {CONFIG} and weights is wanted.")
    if not (folder / CONFIG).is_file():
        raise MixheadError(f"{folder} is no model folder: {CONFIG} is missing.")
    return folder


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration, of a type that the installed transformers knows."""
    file = folder / CONFIG
    if not isinstance(read_json(file).get("model_type"), str):
        raise MixheadError(f"{file} does not say which model it describes (model_type).")
    return or_refuse(
        lambda: AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
        f"{file} describes no model that can be loaded",
    )


def model_class_of(folder: Path, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that the configuration names as its own."""
    name = architecture_of(config) or "nothing"
    nested = hasattr(config, "base_config_class")  # a converted model, saved by an earlier version of this library
    home = importlib.import_module(config.modeling) if isinstance(config, LoadsItsModels) else transformers
    base = getattr(home, name, None)
    if not isinstance(base, type) or not issubclass(base, PreTrainedModel):
        raise MixheadError(f"{folder / CONFIG} names {name} as its architecture, which {home.__name__} does not have.")
    return moh_model_class(base) if nested else base


def load_as(model_class: Any, folder: Path, config: PreTrainedConfig, dtype: Any) -> PreTrainedModel:
    """Loads the weights and checks that none is missing and, in a converted model, none left over."""
    check_weight_files(folder)
    model, info = or_refuse(
        lambda: model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        ),
        f"The model in {folder} cannot be loaded: a file is truncated or corrupt, or they do not belong together",
    )
    if getattr(config, "moh", None) is not None and not isinstance(model, MoHModelMixin):
        raise MixheadError(
            f"{folder / CONFIG} says which heads each layer uses (moh), but not that the model is a converted one "
            "(quantization_config): it was changed, or written by another way than save_pretrained. Save the model "
            "again with mixhead.save."
        )
    missing = sorted(info["missing_keys"])
    unexpected = sorted(info["unexpected_keys"]) if isinstance(model, MoHModelMixin) else []
    if missing or unexpected:
        raise MixheadError(
            f"The weights in {folder} do not fit its {CONFIG}: missing {listed(missing)}, unexpected "
            f"{listed(unexpected)}."
        )
    return model


def check_weight_files(folder: Path) -> None:
    """There are weights, all that an index names, and none is empty or a mere pointer to a download."""
    files = {file for pattern in WEIGHT_FILES for file in folder.glob(pattern)}
    if not files:
        raise MixheadError(f"{folder} holds no weights ({' or '.join(WEIGHT_FILES)}).")
    for file in sorted(files):
        read_start(file)
    check_indexes(folder)


def or_refuse(call: Callable[[], Any], sentence: str) -> Any:
    """What the call returns; whatever it raises becomes the end of the sentence."""
    try:
        return call()
    except (MixheadError, MemoryError):
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and torch raise many types on corrupt files
        raise MixheadError(f"{sentence} ({first_line(error)}).") from error
