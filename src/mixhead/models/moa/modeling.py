"""What the MoA encoder-decoder and the MoA encoder share: the stack of encoder layers, initialisation, losses.

Shape legend: B batch, N tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from mixhead.errors import MixheadError
from mixhead.models.moa.configuration import MoAConfig
from mixhead.models.moa.layers import Embeddings, EncoderLayer, rotary
from mixhead.models.saving import ReadableWeights
from mixhead.nn import MixtureOfAttentionHeads
from mixhead.routing import ExpertRouting

IGNORED = -100  # what labels hold where there is nothing to predict


@dataclass
class MoAOutput(ModelOutput):
    """What a stack of layers returns.

    Attributes:
        last_hidden_state: [B, N, C].
        hidden_states: with `output_hidden_states`, after the embeddings and after each layer, [B, N, C] each.
        routing: the routing of every attention module; empty for a dense model.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    routing: tuple[ExpertRouting, ...] | None = None


class MoAPreTrainedModel(ReadableWeights, PreTrainedModel):
    """What transformers needs to know of these models."""

    config_class = MoAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("EncoderLayer", "DecoderLayer")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Xavier-uniform layers and normal embeddings of variance 1 / C; experts as MoA has them."""
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, MixtureOfAttentionHeads):
            for experts_EXY in (module.q_experts, module.o_experts):
                init_experts(experts_EXY, self.config.expert_similarity)
            if not getattr(module.kv_proj.weight, "_is_hf_initialized", False):
                for proj_XC in module.kv_proj.weight.chunk(2):  # a view has no such mark
                    init.xavier_uniform_(proj_XC, gain=2**-0.5)
            for parameter in module.router.parameters():
                init.zeros_(parameter)


def init_experts(experts_EXY: Tensor, similarity: float) -> None:
    """Xavier-uniform for each expert; what stands at the same place in two of them is correlated by `similarity`."""
    if getattr(experts_EXY, "_is_hf_initialized", False):
        return
    bound = (6.0 / sum(experts_EXY.shape[1:])) ** 0.5
    init.uniform_(experts_EXY, -bound, bound)
    if similarity:
        common_1XY = torch.empty_like(experts_EXY[:1]).uniform_(-bound, bound)
        experts_EXY.mul_((1.0 - similarity) ** 0.5).add_(common_1XY, alpha=similarity**0.5)


class MoAEncoder(MoAPreTrainedModel):
    """Embeddings and encoder layers."""

    main_input_name = "input_ids"

    def __init__(self, config: MoAConfig, tokens: nn.Embedding) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config, tokens)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        **kwargs: object,
    ) -> MoAOutput:
        """Hidden states of every token.

        Args:
            input_ids: [B, N].
            attention_mask: 0 or False at padding, [B, N].
            output_hidden_states: whether to return those of all layers.
            kwargs: what `generate` adds; not used.
        """
        del kwargs
        check_ids("input_ids", input_ids, self.config.vocab_size)
        mask_BN = None if attention_mask is None else attention_mask.bool()
        hidden_BNC, states, routings = self.embeddings(input_ids), [], []
        positions = None
        if self.config.rotary:
            positions = rotary(input_ids.shape[1], self.config.head_dim, self.config.rope_theta, hidden_BNC)
        for layer in self.layers:
            states.append(hidden_BNC)
            hidden_BNC, of_layer = layer(hidden_BNC, mask_BN, positions)
            routings += of_layer
        kept = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return MoAOutput(hidden_BNC, (*states, hidden_BNC) if kept else None, tuple(routings))


def auxiliary_loss(routings: Sequence[ExpertRouting]) -> Tensor | None:
    """Sum of the auxiliary losses of all attention modules (MoA, arXiv 2210.05144), None for a dense model."""
    return torch.stack([routing.aux_loss for routing in routings]).sum() if routings else None


def with_auxiliary(loss: Tensor, auxiliary: Tensor | None, share: Tensor | float = 1.0) -> Tensor:
    """The training loss: that of the task and the auxiliary loss, which counts once per optimizer step.

    Args:
        loss: of the task.
        auxiliary: of the routers.
        share: the part of the step's targets that are in this call (gradient accumulation adds the parts up).
    """
    return loss if auxiliary is None else loss + auxiliary * share


def step_share(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """The share of an optimizer step's targets that this call has; 1 where nobody accumulates."""
    if num_items_in_batch is None:
        return 1.0
    return (labels != IGNORED).sum() / num_items_in_batch


def check_ids(name: str, ids_BN: Tensor, vocab_size: int) -> None:
    """Raises where ids are no whole numbers [B, N]; ids beyond the vocabulary mean another model's tokenizer."""
    if ids_BN.dim() != 2 or ids_BN.is_floating_point():
        raise MixheadError(
            f"{name} must be whole numbers of shape [batch, tokens], got {ids_BN.dtype} {list(ids_BN.shape)}."
        )
    if not torch.compiler.is_compiling() and ids_BN.device.type == "cpu" and ids_BN.numel():
        largest = int(ids_BN.max())
        if largest >= vocab_size:
            raise MixheadError(
                f"{name} holds the token {largest}, but the model knows {vocab_size} tokens: the tokenizer belongs to "
                "another model."
            )
