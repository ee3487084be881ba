"""The published MoH-LLaMA3-8B folder: loaded shard by shard, without its remote code, into a model that routes.

The folder is that of a stock LLaMA (`model_type` "llama", LLaMA's own weight names) with `auto_map` pointing to the
code that routes: a loader that ignores that code runs all heads and says nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from mixhead.errors import MixheadError, first_line, listed
from mixhead.files import read_json
from mixhead.interop.llama import BUFFER, LlamaFilling
from mixhead.interop.safe_load import load_pickle_weights
from mixhead.shards import read_index

REMOTE_CODE = "modeling_llama"
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
# Without do_sample these have no effect, but transformers then refuses to save them.
SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}

Folder = str | os.PathLike[str]
# File -> the names to take from it; None takes all that it has.
Plan = dict[str, list[str] | None]


def is_published_moh_llama(folder: Folder) -> bool:
    """Whether a folder is laid out as the published MoH-LLaMA: a LLaMA whose remote code routes its heads.

    Reads the configuration and, where it was downloaded, looks into the text of the remote code; never executes it.
    """
    try:
        config = read_json(Path(folder) / "config.json")
        code = str(config["auto_map"]["AutoModelForCausalLM"]).rpartition("--")[2]
        if config["model_type"] != "llama" or code != f"{REMOTE_CODE}.LlamaForCausalLM":
            return False
        source = Path(folder) / f"{REMOTE_CODE}.py"
        return not source.exists() or "routed_head" in source.read_text(encoding="utf-8", errors="replace")
    except (OSError, MixheadError, KeyError, TypeError):
        return False


def load_moh_llama(
    folder: Folder,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    on_shard: Callable[[int, int], None] | None = None,
) -> PreTrainedModel:
    """The published MoH-LLaMA3-8B, or any folder of that layout, as a model that routes.

    The files may be `.bin` (pickles, read without executing anything) or safetensors, in shards with an index or
    single. Beside the model itself, never more than one shard has to be in memory. The tokenizer is a stock one:
    `AutoTokenizer.from_pretrained(folder)`. `save_pretrained` writes a mixhead checkpoint.

    Args:
        folder: a local folder.
        dtype: of the weights; "auto" is the one that config.json names or, where it names none, the first weight's.
        device: where the weights go.
        on_shard: called with (files done, files) after each file.

    Returns:
        A converted `LlamaForCausalLM` in evaluation mode: the first half of the heads shared, a quarter routed.

    Raises:
        MixheadError: where a file is missing, truncated, corrupt or tries to execute code, the index names a file
            outside the folder, or names and shapes do not fit the configuration.
    """
    root = Path(folder)
    if not root.is_dir():
        raise MixheadError(
            f"There is no folder {root}. Download the published one with "
            "`hf download Chat-UniVi/MoH-LLaMA3-8B --local-dir FOLDER`."
        )
    config = read_json(root / "config.json")
    if config.get("model_type") == "mixhead" or "moh" in config:
        raise MixheadError(f"{root} is a mixhead checkpoint already: load it with an Auto class of transformers.")
    named_dtype = config.get("dtype") or config.get("torch_dtype") if dtype == "auto" else dtype
    wanted_dtype = None if named_dtype is None else parse_dtype(named_dtype)
    filling: LlamaFilling | None = None
    plan = plan_shards(root)
    indexed = {name for names in plan.values() for name in names or ()}
    if indexed:
        filling = LlamaFilling(config, indexed, "The index")
    for done, (file, names) in enumerate(plan.items(), 1):
        weights = weights_of_shard(root / file, names, indexed)
        if filling is None:
            filling = LlamaFilling(config, weights, file)
        for name in weights:
            wanted_dtype = wanted_dtype or parse_dtype(weights[name].dtype)
            filling.put(name, weights[name], wanted_dtype, device)
        del weights
        if on_shard is not None:
            on_shard(done, len(plan))
    assert filling is not None
    model = filling.finish()
    if (root / "generation_config.json").exists():
        model.generation_config = read_generation_config(root / "generation_config.json")
    return model


def weights_of_shard(file: Path, names: Collection[str] | None, indexed: Collection[str]) -> dict[str, Tensor]:
    """The weights in one file.

    Args:
        file: of PyTorch or safetensors.
        names: those that the index looks for there; None where there is no index.
        indexed: all that the index names.

    Raises:
        MixheadError: where some are missing, or others are there.
    """
    weights = load_pickle_weights(file, allow=())
    if names is None:
        names = [name for name in weights if not BUFFER.search(name)]
    if absent := sorted(set(names) - weights.keys()):
        raise MixheadError(f"{file} lacks weights that the index looks for there: {listed(absent)}.")
    unexpected = sorted(name for name in weights.keys() - {*names} - {*indexed} if not BUFFER.search(name))
    if unexpected:
        raise MixheadError(f"{file} holds weights that the index does not name: {listed(unexpected)}.")
    return {name: weights[name] for name in names}


def parse_dtype(dtype: object) -> torch.dtype:
    """A floating dtype, from itself or its name."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise MixheadError(f"dtype={name} is not supported: choose 'auto', {', '.join(map(repr, DTYPES))}.")
    return DTYPES[name]


def plan_shards(root: Path) -> Plan:
    """Which weights to take from which file; the first complete set in the order of `INDEX_FILES`, `SINGLE_FILES`."""
    incomplete = None
    for index in INDEX_FILES:
        if (root / index).exists():
            plan = by_file(root / index)
            missing = sorted(file for file in plan if not (root / file).is_file())
            if not missing:
                return plan
            incomplete = incomplete or f"{len(missing)} of the {len(plan)} files that {index} names: {listed(missing)}"
    for single in SINGLE_FILES:
        if (root / single).exists():
            return {single: None}
    if incomplete is not None:
        raise MixheadError(f"{root} lacks {incomplete}. Download them again.")
    raise MixheadError(f"{root} holds no weights: there is none of {', '.join((*INDEX_FILES, *SINGLE_FILES))}.")


def by_file(index: Path) -> Plan:
    """The index of a sharded checkpoint, by file."""
    plan: dict[str, list[str]] = {}
    for name, file in read_index(index).items():
        if not BUFFER.search(name):
            plan.setdefault(file, []).append(name)
    return {file: plan[file] for file in sorted(plan)}


def read_generation_config(file: Path) -> GenerationConfig:
    """The published defaults of generation."""
    settings = read_json(file)
    if not settings.get("do_sample"):
        settings = {name: value for name, value in settings.items() if name not in SAMPLING}
    try:
        generation_config = GenerationConfig.from_dict(settings)
        generation_config.validate(strict=True)
    except Exception as error:  # transformers checks in many ways
        raise MixheadError(f"{file} holds no defaults of generation: {first_line(error)}.") from error
    return generation_config
