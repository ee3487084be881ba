"""Configuration of MoH-DiT (mixture-of-head attention in a diffusion transformer) and of dense DiT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from mixhead.errors import MixheadError
from mixhead.routing import LayerHeads, router_kind

PerLayer = int | Sequence[int]
PER_LAYER = ("num_heads", "head_dim", "shared_heads", "top_k")


@dataclass(frozen=True)
class MoHDiTConfig:
    """Sizes of a MoH-DiT (arXiv 2410.11842, section 4.2); without `shared_heads` and `top_k` a dense DiT.

    What is "per layer" may be given as one number for all layers, and is a tuple afterwards.

    Attributes:
        sample_size: side of the square input: of the latents (32 for 256 pixels), or of the image itself.
        patch_size: side of a patch, a divisor of `sample_size`.
        in_channels: of the input.
        hidden_size: C, a multiple of 4.
        depth: number of blocks.
        num_heads: per layer.
        head_dim: per layer; hidden_size / num_heads where it is None.
        shared_heads: per layer, how many heads every token uses; None, with `top_k`, for a dense model.
        top_k: per layer, how many of the other heads each token uses; 0 where all are shared.
        router: one of `mixhead.routing.ROUTERS`: "two_stage" (learned, weighted gates, the published one), or "linear"
            or "query_norm" (0 / 1 gates: a converted dense DiT, whose layers are dense where every head is active).
        mlp_ratio: width of the MLP in units of C.
        num_classes: classes are 0 to num_classes - 1.
        null_class: whether there is one class more, num_classes, which stands for none (classifier-free guidance).
        learn_sigma: whether the model predicts the variance beside the noise, in as many channels again.
        qkv_bias: whether the projections of queries, keys and values have a bias.
        mlp_norm_eps: of the norm before the MLP; 1e-6 in the published code, 1e-5 in diffusers' DiT.
        frequency_shift: the frequencies of the time embedding fall to 1 / 10000 at number 128 (0, as published) or 127
            (1, diffusers' DiT).
        calibrated: False from the conversion of a dense DiT until its routers are calibrated or trained.
    """

    sample_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: PerLayer = 16
    head_dim: PerLayer | None = None
    shared_heads: PerLayer | None = None
    top_k: PerLayer | None = None
    router: str = "two_stage"
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    null_class: bool = True
    learn_sigma: bool = True
    qkv_bias: bool = True
    mlp_norm_eps: float = 1e-6
    frequency_shift: int = 0
    calibrated: bool = True

    def __post_init__(self) -> None:
        self._check_sizes()
        for name in PER_LAYER:
            object.__setattr__(self, name, self._per_layer(name))
        self._check_heads()

    @classmethod
    def named(cls, name: str, **changes: Any) -> MoHDiTConfig:
        """A published configuration, for example "moh-dit-xl-90", for ImageNet's latents of 256 x 256 pixels.

        Args:
            name: one of `PUBLISHED`.
            changes: fields that shall differ.
        """
        if name not in PUBLISHED:
            raise MixheadError(f"The configuration {name!r} is unknown: choose one of {', '.join(PUBLISHED)}.")
        return cls(**{**PUBLISHED[name], **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoHDiTConfig:
        """The configuration that `to_dict` wrote; raises where a field is unknown."""
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise MixheadError(f"This configuration of a MoH-DiT has unknown fields: {', '.join(unknown)}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @property
    def out_channels(self) -> int:
        """Channels of the output: the predicted noise and, with `learn_sigma`, the variance."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def num_tokens(self) -> int:
        """Patches of one input."""
        return (self.sample_size // self.patch_size) ** 2

    @property
    def mlp_size(self) -> int:
        """Width of the MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def layers(self) -> tuple[LayerHeads, ...]:
        """Heads of every layer: all, used by a token, shared by all tokens. In a dense DiT all are used."""
        heads, shared, top_k = self.num_heads, self.shared_heads, self.top_k
        assert isinstance(heads, tuple)
        if shared is None or top_k is None:
            return tuple(LayerHeads(h, h, h) for h in heads)
        assert isinstance(shared, tuple)
        assert isinstance(top_k, tuple)
        return tuple(LayerHeads(h, s + k, s) for h, s, k in zip(heads, shared, top_k, strict=True))

    @property
    def routes(self) -> tuple[bool, ...]:
        """Per layer, whether its heads have gates. The published router weights heads that are all shared, too."""
        if self.shared_heads is None:
            return (False,) * self.depth
        return tuple(router_kind(self.router).weighted or not layer.is_dense for layer in self.layers)

    @property
    def active_share(self) -> float:
        """Share of all heads that a token uses, over all layers."""
        layers = self.layers
        return sum(layer.active_heads for layer in layers) / sum(layer.num_heads for layer in layers)

    def _per_layer(self, name: str) -> tuple[int, ...] | None:
        value = getattr(self, name)
        if name == "head_dim" and value is None:
            return tuple(self._divided(heads) for heads in self.num_heads)  # type: ignore[union-attr]
        if value is None:
            return None
        values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * self.depth
        least = 0 if name in ("shared_heads", "top_k") else 1
        if any(isinstance(v, bool) or not isinstance(v, int) or v < least for v in values):
            raise MixheadError(f"{name}={value!r} must be whole numbers of at least {least}.")
        if len(values) != self.depth:
            raise MixheadError(f"{name} has {len(values)} numbers, but the model has {self.depth} layers (depth).")
        return values

    def _divided(self, heads: int) -> int:
        if self.hidden_size % heads:
            raise MixheadError(f"hidden_size={self.hidden_size} is no multiple of num_heads={heads}: give head_dim.")
        return self.hidden_size // heads

    def _check_sizes(self) -> None:
        for name in ("sample_size", "patch_size", "in_channels", "hidden_size", "depth", "num_classes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MixheadError(f"{name}={value!r} must be a whole number of at least 1.")
        if self.sample_size % self.patch_size:
            raise MixheadError(
                f"An input of {self.sample_size} x {self.sample_size} cannot be cut into patches of "
                f"{self.patch_size} x {self.patch_size}: sample_size must be a multiple of patch_size."
            )
        if self.hidden_size % 4:
            raise MixheadError(f"hidden_size={self.hidden_size} must be a multiple of 4, for the position embedding.")
        if not 0.0 < self.mlp_ratio < math.inf:
            raise MixheadError(f"mlp_ratio={self.mlp_ratio} must be a positive number.")
        if self.frequency_shift not in (0, 1):
            raise MixheadError(
                f"frequency_shift={self.frequency_shift} must be 0 (as published) or 1 (diffusers' DiT)."
            )

    def _check_heads(self) -> None:
        if (self.shared_heads is None) != (self.top_k is None):
            raise MixheadError("Give both shared_heads and top_k, or neither for a dense DiT.")
        kind = router_kind(self.router)
        if self.shared_heads is None:
            return
        for number, layer in enumerate(self.layers):
            if layer.active_heads > layer.num_heads:
                raise MixheadError(
                    f"Layer {number} has {layer.num_heads} heads, too few for shared_heads={layer.shared_heads} and "
                    f"top_k={layer.active_heads - layer.shared_heads}."
                )
            if kind.weighted and layer.active_heads == layer.shared_heads < layer.num_heads:
                raise MixheadError(
                    f"Layer {number}: top_k=0 leaves {layer.num_heads - layer.shared_heads} of {layer.num_heads} heads "
                    "unused for ever: choose top_k >= 1 or make every head shared."
                )


def runs(*parts: tuple[int, int]) -> tuple[int, ...]:
    """(8, 9), (16, 10) is 8 in nine layers and 16 in the ten after them."""
    return tuple(value for value, count in parts for _ in range(count))


SMALL: dict[str, Any] = {"hidden_size": 384, "depth": 12, "num_heads": 6}
BASE: dict[str, Any] = {"hidden_size": 768, "depth": 12, "num_heads": 12}
LARGE: dict[str, Any] = {"hidden_size": 1024, "depth": 24, "num_heads": 16}
XLARGE: dict[str, Any] = {"hidden_size": 1152, "depth": 28, "num_heads": 16}
# The large MoH-DiTs have as many heads as the dense ones, but more of them in deeper layers.
MOH_LARGE: dict[str, Any] = {**LARGE, "num_heads": runs((8, 8), (16, 8), (24, 8)), "head_dim": 64}
MOH_XLARGE: dict[str, Any] = {**XLARGE, "num_heads": runs((8, 9), (16, 10), (24, 9)), "head_dim": 72}

PUBLISHED: dict[str, dict[str, Any]] = {
    "moh-dit-s-90": {**SMALL, "shared_heads": runs((3, 8), (6, 4)), "top_k": runs((2, 8), (0, 4))},
    "moh-dit-s-75": {
        **SMALL,
        "shared_heads": runs((2, 2), (3, 8), (6, 2)),
        "top_k": runs((1, 6), (2, 4), (0, 2)),
    },
    "moh-dit-b-90": {**BASE, "shared_heads": runs((6, 5), (7, 5), (12, 2)), "top_k": runs((4, 10), (0, 2))},
    "moh-dit-b-75": {
        **BASE,
        "shared_heads": runs((4, 2), (6, 8), (12, 2)),
        "top_k": runs((2, 2), (3, 8), (0, 2)),
    },
    "moh-dit-l-90": {**MOH_LARGE, "shared_heads": runs((8, 8), (16, 16)), "top_k": runs((0, 16), (3, 8))},
    "moh-dit-l-75": {**MOH_LARGE, "shared_heads": runs((8, 16), (12, 8)), "top_k": runs((0, 8), (4, 16))},
    "moh-dit-xl-90": {**MOH_XLARGE, "shared_heads": runs((8, 9), (16, 19)), "top_k": runs((0, 19), (3, 9))},
    "moh-dit-xl-75": {
        **MOH_XLARGE,
        "shared_heads": runs((8, 9), (10, 10), (14, 9)),
        "top_k": runs((0, 9), (2, 19)),
    },
    "dit-s": SMALL,
    "dit-b": BASE,
    "dit-l": LARGE,
    "dit-xl": XLARGE,
}
