"""Models with mixture of attention heads (MoA): an encoder-decoder for translation and a BERT-like encoder."""

from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from mixhead.models.moa.configuration import NAMED, MoAConfig, MoAEncoderConfig, MoATransformerConfig
from mixhead.models.moa.masked_lm import MoAForMaskedLM, MoAMaskedLMOutput
from mixhead.models.moa.transformer import MoASeq2SeqOutput, MoATransformerForConditionalGeneration

__all__ = [
    "NAMED",
    "MoAConfig",
    "MoAEncoderConfig",
    "MoAForMaskedLM",
    "MoAMaskedLMOutput",
    "MoASeq2SeqOutput",
    "MoATransformerConfig",
    "MoATransformerForConditionalGeneration",
    "register_moa",
]


def register_moa() -> None:
    """Lets the Auto classes of transformers load these models; called by `import mixhead`."""
    AutoConfig.register(MoATransformerConfig.model_type, MoATransformerConfig, exist_ok=True)
    AutoConfig.register(MoAEncoderConfig.model_type, MoAEncoderConfig, exist_ok=True)
    AutoModelForSeq2SeqLM.register(MoATransformerConfig, MoATransformerForConditionalGeneration, exist_ok=True)
    AutoModelForMaskedLM.register(MoAEncoderConfig, MoAForMaskedLM, exist_ok=True)
