"""The models of both papers, and any model of transformers in mixture-of-head form: one folder each."""

from typing import TYPE_CHECKING

from mixhead.lazy import loaded_on_use

if TYPE_CHECKING:
    from mixhead.models import hugging_face, jetmoe, moa, moh_dit, moh_vit
else:
    __getattr__, __dir__ = loaded_on_use(
        __name__,
        {f".{model}": [model] for model in ("hugging_face", "jetmoe", "moa", "moh_dit", "moh_vit")},
    )

__all__ = ["hugging_face", "jetmoe", "moa", "moh_dit", "moh_vit"]
