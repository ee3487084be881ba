"""Configuration of MoH-ViT (mixture-of-head attention on TransNeXt) and of dense TransNeXt, and the published ones."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from mixhead.errors import MixheadError
from mixhead.models.auto import LoadsItsModels

PER_STAGE = ("hidden_sizes", "num_heads", "depths", "mlp_ratios", "pool_ratios")
ROUTED = ("shared_heads", "top_k")
# Whatever weights belong to: fixed once a configuration is made.
ARCHITECTURE = (*PER_STAGE, *ROUTED, "two_stage", "image_size", "num_channels", "patch_size", "window_size", "qkv_bias")


class MoHTransNeXtConfig(LoadsItsModels, PreTrainedConfig):
    """Sizes of a MoH-ViT (arXiv 2410.11842, section 4.1); without `shared_heads` and `top_k` a dense TransNeXt.

    All stages but the last use aggregated attention, the last one global attention. The fields of the architecture
    cannot be changed afterwards: weights belong to them.

    Attributes:
        image_size: side of the training images in pixels. Other sizes, also not square ones, are taken as well;
            positions are relative to this one.
        num_channels: of the images.
        patch_size: stride of the first embedding; each further stage halves the map.
        hidden_sizes, num_heads, depths, mlp_ratios: one number per stage.
        pool_ratios: by how much each side of the map is pooled for the pooled keys; 1 in the last stage.
        window_size: side of the local window, odd.
        shared_heads: per stage, how many heads (the first) every token uses; None, with `top_k`, for a dense model.
        top_k: per stage, how many of the other heads each token uses; 0 where all are shared.
        two_stage: whether a second stage of the router weighs shared against routed heads, as published; False only to
            see what that is worth.
        qkv_bias: whether the projections of queries, keys and values have a bias.
        layer_norm_eps: of the norms in blocks and after stages.
        drop_path_rate: of stochastic depth in the last block; it rises linearly from 0 in the first one.
        balance_coefficient: weight of the balance loss in the training loss.
    """

    model_type = "moh_vit"
    modeling = "mixhead.models.moh_vit.modeling"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["balance_loss", "hidden_states", "routing"]

    image_size: int = 224
    num_channels: int = 3
    patch_size: int = 4
    hidden_sizes: tuple[int, ...] = (96, 192, 384, 768)
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    depths: tuple[int, ...] = (5, 5, 23, 5)
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    pool_ratios: tuple[int, ...] = (8, 4, 2, 1)
    window_size: int = 3
    shared_heads: tuple[int, ...] | None = None
    top_k: tuple[int, ...] | None = None
    two_stage: bool = True
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-6
    drop_path_rate: float = 0.0
    balance_coefficient: float = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        for name in (*PER_STAGE, *ROUTED):
            value = getattr(self, name)
            if isinstance(value, list):  # as JSON has it
                setattr(self, name, tuple(value))
        self._check_sizes()
        self._check_heads()
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ARCHITECTURE and self.__dict__.get("_post_init_done"):
            value = tuple(value) if isinstance(value, list) else value
            if value != getattr(self, name):
                raise MixheadError(
                    f"{name} of a configuration that is made cannot be changed: make another {type(self).__name__}."
                )
        super().__setattr__(name, value)

    @classmethod
    def named(cls, name: str, **changes: Any) -> MoHTransNeXtConfig:
        """A published configuration, for example "moh-vit-b-75", with ImageNet-1K's 1,000 classes.

        Args:
            name: one of `PUBLISHED`.
            changes: fields that shall differ.
        """
        if name not in PUBLISHED:
            raise MixheadError(f"The configuration {name!r} is unknown: choose one of {', '.join(PUBLISHED)}.")
        return cls(**{"num_labels": 1000, **PUBLISHED[name], **changes})

    @property
    def num_stages(self) -> int:
        """How many stages there are."""
        return len(self.hidden_sizes)

    @property
    def hidden_size(self) -> int:
        """Width of the features that the classifier sees."""
        return self.hidden_sizes[-1]

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks in all stages."""
        return sum(self.depths)

    @property
    def routes(self) -> bool:
        """Whether the heads have gates; False for a dense TransNeXt."""
        return self.shared_heads is not None

    @property
    def active_share(self) -> float:
        """Share of all heads that a token uses, over all layers; the shared heads count as used."""
        heads = sum(depth * heads for depth, heads in zip(self.depths, self.num_heads, strict=True))
        if self.shared_heads is None or self.top_k is None:
            return 1.0
        stages = zip(self.depths, self.shared_heads, self.top_k, strict=True)
        return sum(depth * (shared + top_k) for depth, shared, top_k in stages) / heads

    @property
    def smallest_side(self) -> int:
        """The shortest side in pixels that an image may have."""
        return self.patch_size * 2 ** (self.num_stages - 1)

    def _check_sizes(self) -> None:
        for name in ("image_size", "num_channels", "patch_size", "window_size"):
            if not is_count(getattr(self, name)):
                raise MixheadError(f"{name}={getattr(self, name)!r} must be a whole number of at least 1.")
        if self.window_size % 2 == 0:
            raise MixheadError(f"window_size={self.window_size} must be odd: a window has a token in its middle.")
        if self.hidden_sizes == ():
            raise MixheadError("hidden_sizes is empty: give one number per stage.")
        for name in PER_STAGE:
            values = getattr(self, name)
            whole = name != "mlp_ratios"
            if not isinstance(values, tuple) or not all(is_count(v) if whole else v > 0 for v in values):
                raise MixheadError(f"{name}={values!r} must be a list of positive {'whole ' if whole else ''}numbers.")
            if len(values) != self.num_stages:
                raise MixheadError(f"{name} has {len(values)} numbers, but hidden_sizes has {self.num_stages} stages.")
        if self.image_size < self.smallest_side:
            raise MixheadError(
                f"image_size={self.image_size} is too small for {self.num_stages} stages: it must be at least "
                f"{self.smallest_side}."
            )
        if self.pool_ratios[-1] != 1:
            raise MixheadError(f"pool_ratios={self.pool_ratios} must end in 1: the last stage attends to every token.")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise MixheadError(f"drop_path_rate={self.drop_path_rate} must be at least 0 and below 1.")
        if self.balance_coefficient < 0.0:
            raise MixheadError(f"balance_coefficient={self.balance_coefficient} must not be negative.")

    def _check_heads(self) -> None:
        for stage, (width, heads) in enumerate(zip(self.hidden_sizes, self.num_heads, strict=True), 1):
            if width % heads:
                raise MixheadError(f"Stage {stage}: num_heads={heads} must divide hidden_sizes={width}.")
        if self.shared_heads is None and self.top_k is None:
            return
        for name in ROUTED:
            values = getattr(self, name)
            if (
                not isinstance(values, tuple)
                or len(values) != self.num_stages
                or not all(v == 0 or is_count(v) for v in values)
            ):
                raise MixheadError(
                    f"{name}={values!r} must be a list of {self.num_stages} whole numbers, one per stage; a dense "
                    "model has neither shared_heads nor top_k."
                )
        assert self.shared_heads is not None
        assert self.top_k is not None
        for stage, (heads, shared, top_k) in enumerate(
            zip(self.num_heads, self.shared_heads, self.top_k, strict=True), 1
        ):
            if shared + top_k > heads:
                raise MixheadError(
                    f"Stage {stage} has {heads} heads, too few for shared_heads={shared} and top_k={top_k}."
                )
            if top_k == 0 and shared < heads:
                raise MixheadError(
                    f"Stage {stage}: top_k=0 leaves {heads - shared} of {heads} heads unused for ever: choose "
                    "top_k >= 1 or make every head shared."
                )


def is_count(value: object) -> bool:
    """Whether it is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


SMALL = {"hidden_sizes": (72, 144, 288, 576), "num_heads": (3, 6, 12, 24), "depths": (5, 5, 22, 5)}
BASE = {"hidden_sizes": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32), "depths": (5, 5, 23, 5)}

PUBLISHED: dict[str, dict[str, Any]] = {
    "moh-vit-b-75": {**BASE, "shared_heads": (4, 8, 4, 5), "top_k": (0, 0, 8, 16), "drop_path_rate": 0.6},
    "moh-vit-b-50": {**BASE, "shared_heads": (2, 2, 2, 4), "top_k": (2, 4, 6, 8), "drop_path_rate": 0.6},
    "moh-vit-s-80": {**SMALL, "shared_heads": (3, 6, 3, 8), "top_k": (0, 0, 6, 12), "drop_path_rate": 0.45},
    "moh-vit-s-75": {**SMALL, "shared_heads": (3, 6, 3, 4), "top_k": (0, 0, 6, 12), "drop_path_rate": 0.45},
    "transnext-tiny": {**SMALL, "depths": (2, 2, 15, 2), "drop_path_rate": 0.25},
    "transnext-small": {**SMALL, "drop_path_rate": 0.45},
    "transnext-base": {**BASE, "drop_path_rate": 0.6},
}
