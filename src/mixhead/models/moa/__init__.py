"""Models with mixture of attention heads (MoA): an encoder-decoder for translation and a BERT-like encoder."""

from typing import TYPE_CHECKING

from mixhead.lazy import loaded_on_use

if TYPE_CHECKING:
    from mixhead.models.moa.configuration import NAMED, MoAConfig, MoAEncoderConfig, MoATransformerConfig
    from mixhead.models.moa.masked_lm import MoAForMaskedLM, MoAMaskedLMOutput
    from mixhead.models.moa.transformer import MoASeq2SeqOutput, MoATransformerForConditionalGeneration
else:
    __getattr__, __dir__ = loaded_on_use(
        __name__,
        {
            ".configuration": ["NAMED", "MoAConfig", "MoAEncoderConfig", "MoATransformerConfig"],
            ".masked_lm": ["MoAForMaskedLM", "MoAMaskedLMOutput"],
            ".transformer": ["MoASeq2SeqOutput", "MoATransformerForConditionalGeneration"],
        },
    )

__all__ = [
    "NAMED",
    "MoAConfig",
    "MoAEncoderConfig",
    "MoAForMaskedLM",
    "MoAMaskedLMOutput",
    "MoASeq2SeqOutput",
    "MoATransformerConfig",
    "MoATransformerForConditionalGeneration",
]
