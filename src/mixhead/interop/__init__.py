"""Published checkpoints: safe loading, and models from the official code's weights."""

from mixhead.interop.diffusers_dit import load_diffusers_dit
from mixhead.interop.dit import export_moh_dit, load_moh_dit
from mixhead.interop.official import from_official
from mixhead.interop.open_dit import holds_dit, open_dit
from mixhead.interop.published_llama import is_published_moh_llama, load_moh_llama
from mixhead.interop.safe_load import PUBLISHED_CLASSES, load_pickle, load_pickle_weights
from mixhead.interop.vit import load_moh_vit

__all__ = [
    "PUBLISHED_CLASSES",
    "export_moh_dit",
    "from_official",
    "holds_dit",
    "is_published_moh_llama",
    "load_diffusers_dit",
    "load_moh_dit",
    "load_moh_llama",
    "load_moh_vit",
    "load_pickle",
    "load_pickle_weights",
    "open_dit",
]
