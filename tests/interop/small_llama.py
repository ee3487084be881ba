"""A Llama of tiny size."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def stock_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, "initializer_range": 0.3, **changes}))
    return model.eval()


def tokens(batch=2, length=9) -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(2))
