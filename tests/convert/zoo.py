"""One tiny random model of every architecture that the library promises to convert, with inputs for it.

All have two layers and four heads in each (CLIP: four and eight), random weights and sequences of seven tokens, so that
a test over the whole zoo takes seconds. They are loaded from a folder, as published models are: transformers renames
and fuses many weights at loading, and only a loaded model knows that.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as t
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY, TOKENS, PADDING = 64, 7, 0
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PADDING,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}  # two query heads to one key-value head
IMAGE = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Animal:
    """An architecture of the zoo.

    Attributes:
        make: loads the model in eval mode, with the same weights every time; `make(layers=1)` a shorter one.
        inputs: arguments of its forward.
        labels: what makes its forward return a loss.
        auto_class: the Auto class that loads it.
        answer: name of the output to compare.
        writes: whether it is a decoder that generates text from `input_ids` alone.
        pads: whether it takes an `attention_mask` for its `input_ids`.
    """

    make: Callable[..., PreTrainedModel]
    inputs: Callable[[], dict[str, Tensor]]
    labels: Callable[[], dict[str, Any]]
    auto_class: Any = t.AutoModelForCausalLM
    answer: str = "logits"
    writes: bool = True
    pads: bool = True


def tokens(batch: int = 2, length: int = TOKENS) -> Tensor:
    """Random ids [batch, length] without the special tokens 0, 1 and 2."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def pixels(size: int = 8) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def maker(model_class: type[PreTrainedModel], config: Callable[[], Any]) -> Callable[..., PreTrainedModel]:
    @functools.cache
    def saved(layers: int) -> tempfile.TemporaryDirectory[str]:
        folder = tempfile.TemporaryDirectory()
        random_model(model_class, with_layers(config(), layers)).save_pretrained(folder.name)
        return folder

    def make(layers: int = 2) -> PreTrainedModel:
        return model_class.from_pretrained(saved(layers).name)

    return make


def random_model(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """The same random weights every time; nothing in it was loaded."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = model_class(config).eval()
        with torch.no_grad():
            # Weights of 0.02 make attention uniform and all tokens alike: a wrong mask would hardly show.
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
                else:
                    # Norms of one would give every head the same query norm in models that normalise queries.
                    parameter.add_(torch.randn_like(parameter) * (0.1 if name.endswith("bias") else 0.5))
    return model


def with_layers(config: Any, layers: int) -> Any:
    """The configuration cut to so many layers."""
    for part in (config, *(getattr(config, key) for key in config.sub_configs)):
        for name in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
            if getattr(part, name, None) is not None:
                setattr(part, name, min(layers, getattr(part, name)))
        if getattr(part, "layer_types", None) is not None:
            part.layer_types = part.layer_types[:layers]
        if hasattr(part, "stage_names"):
            part.stage_names = part.stage_names[: layers + 1]
            part.set_output_features_output_indices(out_features=None, out_indices=None)
    return config


def language_model(model_class: type[PreTrainedModel], config: Callable[[], Any]) -> Animal:
    return Animal(maker(model_class, config), lambda: {"input_ids": tokens()}, lambda: {"labels": tokens()})


def encoder(model_class: type[PreTrainedModel], config: Callable[[], Any], auto: Any, labels: Tensor) -> Animal:
    return Animal(
        maker(model_class, config), lambda: {"input_ids": tokens()}, lambda: {"labels": labels}, auto, writes=False
    )


def classifier(model_class: type[PreTrainedModel], config: Callable[[], Any]) -> Animal:
    return Animal(
        maker(model_class, config),
        lambda: {"pixel_values": pixels()},
        lambda: {"labels": torch.tensor([0, 2])},
        t.AutoModelForImageClassification,
        writes=False,
        pads=False,
    )


def clip_config() -> t.CLIPConfig:
    return t.CLIPConfig(
        text_config={**SIZES, "projection_dim": 16},
        vision_config={**IMAGE, "intermediate_size": 48, "projection_dim": 16, "num_attention_heads": 8},
        projection_dim=16,
    )


def whisper_config() -> t.WhisperConfig:
    return t.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=32,
        pad_token_id=PADDING,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )


def sound() -> Tensor:
    return torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(2))


SLIDING = ["sliding_attention", "full_attention"]

ZOO: dict[str, Animal] = {
    "llama": language_model(t.LlamaForCausalLM, lambda: t.LlamaConfig(**GROUPED)),
    "mistral": language_model(t.MistralForCausalLM, lambda: t.MistralConfig(**GROUPED, sliding_window=4)),
    "qwen2": language_model(t.Qwen2ForCausalLM, lambda: t.Qwen2Config(**GROUPED)),
    "qwen3": language_model(t.Qwen3ForCausalLM, lambda: t.Qwen3Config(**GROUPED, head_dim=16)),
    "gemma2": language_model(
        t.Gemma2ForCausalLM,
        lambda: t.Gemma2Config(
            **GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=4, attn_logit_softcapping=None
        ),
    ),
    "gemma3": language_model(
        t.Gemma3ForCausalLM,
        lambda: t.Gemma3TextConfig(
            **GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=4, layer_types=SLIDING
        ),
    ),
    "phi3": language_model(t.Phi3ForCausalLM, lambda: t.Phi3Config(**GROUPED)),
    "olmo2": language_model(t.Olmo2ForCausalLM, lambda: t.Olmo2Config(**GROUPED)),
    "gpt2": language_model(
        t.GPT2LMHeadModel,
        lambda: t.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            pad_token_id=PADDING,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "gpt_neox": language_model(t.GPTNeoXForCausalLM, lambda: t.GPTNeoXConfig(**SIZES)),
    "bert": encoder(
        t.BertForMaskedLM,
        lambda: t.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        t.AutoModelForMaskedLM,
        tokens(),
    ),
    "roberta": encoder(
        t.RobertaForSequenceClassification,
        lambda: t.RobertaConfig(**SIZES, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        t.AutoModelForSequenceClassification,
        torch.tensor([0, 2]),
    ),
    "vit": classifier(
        t.ViTForImageClassification,
        lambda: t.ViTConfig(
            **IMAGE, intermediate_size=48, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ),
    ),
    "deit": classifier(
        t.DeiTForImageClassification,
        lambda: t.DeiTConfig(
            **IMAGE, intermediate_size=48, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ),
    ),
    "dinov2": classifier(t.Dinov2ForImageClassification, lambda: t.Dinov2Config(**IMAGE, mlp_ratio=2, num_labels=3)),
    "clip": Animal(
        maker(t.CLIPModel, clip_config),
        lambda: {"input_ids": tokens(), "pixel_values": pixels()},
        lambda: {"return_loss": True},
        t.AutoModel,
        answer="logits_per_image",
        writes=False,
    ),
    "whisper": Animal(
        maker(t.WhisperForConditionalGeneration, whisper_config),
        lambda: {"input_features": sound(), "decoder_input_ids": tokens()},
        lambda: {"labels": tokens()},
        t.AutoModelForSpeechSeq2Seq,
        writes=False,
        pads=False,
    ),
}


def bare(model_class: type[PreTrainedModel], config: Callable[[], Any]) -> Animal:
    return Animal(
        maker(model_class, config),
        lambda: {"pixel_values": pixels()},
        dict,
        t.AutoModel,
        "last_hidden_state",
        False,
        False,
    )


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
# More of those whose weights transformers renames, splits or fuses at loading (its conversion mapping).
RENAMED: dict[str, Animal] = {
    "bare vit": bare(t.ViTModel, lambda: t.ViTConfig(**IMAGE, intermediate_size=48)),
    "bare deit": bare(t.DeiTModel, lambda: t.DeiTConfig(**IMAGE, intermediate_size=48)),
    "bare dinov2": bare(t.Dinov2Model, lambda: t.Dinov2Config(**IMAGE, mlp_ratio=2)),
    "mixtral": language_model(
        t.MixtralForCausalLM, lambda: t.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen2_moe": language_model(
        t.Qwen2MoeForCausalLM,
        lambda: t.Qwen2MoeConfig(**GROUPED, **EXPERTS, num_experts=4, shared_expert_intermediate_size=16),
    ),
    "qwen3_moe": language_model(
        t.Qwen3MoeForCausalLM, lambda: t.Qwen3MoeConfig(**GROUPED, **EXPERTS, num_experts=4, head_dim=8)
    ),
    "olmoe": language_model(t.OlmoeForCausalLM, lambda: t.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2)),
}
GQA = [name for name, animal in ZOO.items() if getattr(animal.make().config, "num_key_value_heads", None) == 2]
WRITERS = [name for name, animal in ZOO.items() if animal.writes]

# (name, router): every architecture with the default router, a few with the others too.
EVERY = [(name, "linear") for name in ZOO]
EVERY += [
    (name, router) for name in ("llama", "gemma3", "gpt2", "bert", "clip") for router in ("query_norm", "two_stage")
]


@torch.no_grad()
def answer(animal: Animal, model: Any, **more: Any) -> Tensor:
    """The output that a user of this architecture reads."""
    return getattr(model(**animal.inputs(), **more), animal.answer)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and values; NaN never equals anything."""
    return a.dtype == b.dtype and torch.equal(a, b)
