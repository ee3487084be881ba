"""Configurations of models with mixture of attention heads (MoA, arXiv 2210.05144), and of their dense baselines."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from mixhead.errors import MixheadError
from mixhead.models.auto import LoadsItsModels

# Whatever weights belong to: fixed once a configuration is made.
ARCHITECTURE = (
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_key_value_heads",
    "head_dim",
    "active_heads",
)

POSITIONS = ("sinusoidal", "rotary")


class MoAConfig(LoadsItsModels, PreTrainedConfig):
    """What both models have in common: sizes, attention, dropout and the weights of the auxiliary losses.

    Attributes:
        vocab_size: of the one vocabulary; embeddings and the output layer share their weights.
        hidden_size: C.
        intermediate_size: width of the feed-forward layers.
        num_heads: E attention experts, which share one key and one value projection; with `active_heads=None` the
            heads of plain multi-head attention, each with its own.
        num_key_value_heads: K, heads of every expert, each with a key and a value head that the experts share (1 in
            MoA, 16 in JetMoE). An expert is K * head_dim wide. Plain multi-head attention does not read it.
        head_dim: D; num_heads * head_dim need not be hidden_size.
        active_heads: how many experts each token uses; None for a dense Transformer.
        normalisation: of the gates, "softmax" (the plain probabilities, as in the published code) or "renormalised"
            (divided by the sum of the chosen ones).
        noisy: whether the router adds learned noise to its scores in training.
        sample_k: how many of the active_heads experts are drawn by their probability in training.
        expert_similarity: correlation of the experts' first weights, below 1. Above 0, the keys and values that experts
            share learn in one direction from the start; independent experts pull them in as many as there are experts,
            which costs short trainings much (0, as in the published code, by default).
        dropout: after embeddings, attention and feed-forward layers.
        attention_dropout: of attention weights; any rate above 0 runs the stock kernel in training.
        activation_dropout: inside feed-forward layers.
        switch_weight: of the switch loss of each attention module in the training loss.
        z_weight: of the router z-loss of each attention module.
        cv_weight: of the squared coefficient of variation of the gates of each attention module.
        layer_norm_eps: of all norms, which follow the residual sums (post-LN).
    """

    modeling = "mixhead.models.moa.modeling"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "cache",
        "auxiliary_loss",
        "routing",
        "encoder_last_hidden_state",
    ]

    vocab_size: int = 32768
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = 128
    active_heads: int | None = 8
    normalisation: str = "softmax"
    noisy: bool = False
    sample_k: int = 0
    expert_similarity: float = 0.0
    dropout: float = 0.2
    attention_dropout: float = 0.2
    activation_dropout: float = 0.1
    switch_weight: float = 0.01
    z_weight: float = 0.001
    cv_weight: float = 0.0
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("vocab_size", *ARCHITECTURE[:-1], *self.depths()):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise MixheadError(f"{name}={value!r} must be a whole number of at least 1.")
        if self.active_heads is not None and not 1 <= self.active_heads <= self.num_heads:
            raise MixheadError(
                f"active_heads={self.active_heads} must be from 1 to num_heads={self.num_heads}; for a dense "
                "Transformer it is None."
            )
        if self.hidden_size % 2:
            raise MixheadError(f"hidden_size={self.hidden_size} must be even: positions are pairs of sine and cosine.")
        for name in ("dropout", "attention_dropout", "activation_dropout", "expert_similarity"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise MixheadError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ARCHITECTURE and self.__dict__.get("_post_init_done") and value != getattr(self, name):
            raise MixheadError(
                f"{name} of a configuration that is made cannot be changed: make another {type(self).__name__}."
            )
        super().__setattr__(name, value)

    @property
    def routes(self) -> bool:
        """Whether the heads are attention experts; False for a dense Transformer."""
        return self.active_heads is not None

    @property
    def rotary(self) -> bool:
        """Whether attention turns queries and keys by their positions; False where embeddings hold the positions."""
        return False

    @classmethod
    def depths(cls) -> tuple[str, ...]:
        """Names of the fields that hold numbers of layers."""
        return ()


class MoATransformerConfig(MoAConfig):
    """An encoder-decoder with MoA in encoder, decoder and cross-attention; see `MoAConfig`.

    Attributes:
        encoder_layers: number of layers of the encoder.
        decoder_layers: number of layers of the decoder.
        bos_token_id, eos_token_id: of the vocabulary; a translation ends in the latter.
        decoder_start_token_id: what the decoder sees before the first token.
    """

    model_type = "moa_transformer"
    modeling = "mixhead.models.moa.transformer"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "num_heads",
    }

    encoder_layers: int = 6
    decoder_layers: int = 6
    is_encoder_decoder: bool = True
    use_cache: bool = True
    bos_token_id: int = 1
    eos_token_id: int = 2
    decoder_start_token_id: int = 1

    @classmethod
    def depths(cls) -> tuple[str, ...]:
        """Names of the fields that hold numbers of layers."""
        return ("encoder_layers", "decoder_layers")

    @classmethod
    def named(cls, name: str, **changes: Any) -> MoATransformerConfig:
        """A configuration by name, for example "moa-base" (8K8E128D).

        Args:
            name: one of `NAMED`.
            changes: fields that shall differ.

        Raises:
            MixheadError: where there is no such name.
        """
        if name not in NAMED:
            raise MixheadError(f"The configuration {name!r} is unknown: choose one of {', '.join(NAMED)}.")
        return cls(**{**NAMED[name], **changes})


class MoAEncoderConfig(MoAConfig):
    """A BERT-like encoder with MoA; see `MoAConfig`.

    Attributes:
        num_hidden_layers: number of layers.
        position_embedding_type: "sinusoidal", added to the embeddings as in the translation models, or "rotary",
            turning queries and keys (arXiv 2104.09864). With the latter masks find their neighbours much sooner: short
            trainings with sinusoids do not get past the frequencies of words.
        rope_theta: of rotary positions, the period of the slowest pair is about 2 pi times this many tokens.
    """

    model_type = "moa_encoder"
    modeling = "mixhead.models.moa.masked_lm"
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads"}

    num_hidden_layers: int = 6
    position_embedding_type: str = "sinusoidal"
    rope_theta: float = 10000.0
    bos_token_id: int = 1
    eos_token_id: int = 2

    def __post_init__(self, **kwargs: Any) -> None:
        if self.position_embedding_type not in POSITIONS:
            raise MixheadError(
                f"position_embedding_type={self.position_embedding_type!r} is unknown: choose one of "
                f"{', '.join(POSITIONS)}."
            )
        if not self.rope_theta > 0:
            raise MixheadError(f"rope_theta={self.rope_theta} must be a positive number.")
        if self.rotary and self.head_dim % 2:
            raise MixheadError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs of channels.")
        super().__post_init__(**kwargs)

    @property
    def rotary(self) -> bool:
        """Whether attention turns queries and keys by their positions; False where embeddings hold the positions."""
        return self.position_embedding_type == "rotary"

    @classmethod
    def depths(cls) -> tuple[str, ...]:
        """Names of the fields that hold numbers of layers."""
        return ("num_hidden_layers",)


_BASE = {"hidden_size": 512, "intermediate_size": 2048, "encoder_layers": 6, "decoder_layers": 6}
_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
_TINY = {**_SMALL, "hidden_size": 128, "intermediate_size": 512}

# Per attention module MoA has (2 E + 2) C D weights and uses (2 k + 2) C D of them for a token, multi-head attention
# has and uses 4 H C D: the dense ones named after a MoA match it in one or the other.
NAMED: dict[str, dict[str, Any]] = {
    "moa-base": {**_BASE, "num_heads": 8, "active_heads": 8, "head_dim": 128},
    "moa-big": {**_BASE, "num_heads": 32, "active_heads": 16, "head_dim": 256},
    "transformer-base": {**_BASE, "num_heads": 8, "active_heads": None, "head_dim": 64},
    "moa-small": {**_SMALL, "num_heads": 8, "active_heads": 3, "head_dim": 128},
    "transformer-small-same-compute": {**_SMALL, "num_heads": 4, "active_heads": None, "head_dim": 64},
    "transformer-small-same-parameters": {**_SMALL, "num_heads": 9, "active_heads": None, "head_dim": 64},
    "moa-tiny": {**_TINY, "num_heads": 8, "active_heads": 3, "head_dim": 64},
    "transformer-tiny-same-compute": {**_TINY, "num_heads": 4, "active_heads": None, "head_dim": 32},
    "transformer-tiny-same-parameters": {**_TINY, "num_heads": 9, "active_heads": None, "head_dim": 32},
}
