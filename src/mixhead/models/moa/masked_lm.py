"""The MoA encoder for masked language modelling (BERT-like), and with dense attention the encoder beside it.

Shape legend: B batch, N tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM
from transformers.utils import ModelOutput

from mixhead.models.moa.configuration import MoAEncoderConfig
from mixhead.models.moa.modeling import (
    IGNORED,
    MoAEncoder,
    MoAPreTrainedModel,
    auxiliary_loss,
    step_share,
    with_auxiliary,
)
from mixhead.models.moa.transformer import cross_entropy
from mixhead.routing import ExpertRouting


@dataclass
class MoAMaskedLMOutput(ModelOutput):
    """What the masked language model returns.

    Attributes:
        loss: where labels were given: the cross entropy and, in training mode, the auxiliary loss.
        logits: [B, N, V]; where labels were given in training mode, of the targets alone, [1, targets, V].
        auxiliary_loss: sum of the routers' losses over all attention modules; None for a dense model.
        hidden_states: with `output_hidden_states`.
        routing: with `output_routing`, the routing of every attention module.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    auxiliary_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    routing: tuple[ExpertRouting, ...] | None = None


class MaskedLMHead(nn.Module):
    """A layer, a norm, and scores by the embeddings with a bias: [B, N, C] -> [B, N, V]."""

    def __init__(self, config: MoAEncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_BNC: Tensor) -> Tensor:
        return self.decoder(self.norm(F.gelu(self.dense(hidden_BNC))))


class MoAForMaskedLM(MoAPreTrainedModel):
    """A MoA encoder that predicts masked tokens; the output layer shares the embeddings' weights."""

    config_class = MoAEncoderConfig
    main_input_name = "input_ids"
    accepts_loss_kwargs = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.decoder.weight": "model.embeddings.tokens.weight"}

    def __init__(self, config: MoAEncoderConfig) -> None:
        super().__init__(config)
        tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.model = MoAEncoder(config, tokens)
        self.lm_head = MaskedLMHead(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of embeddings."""
        return self.model.embeddings.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the table of embeddings."""
        self.model.embeddings.tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The layer that shares its weights."""
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replaces the output layer."""
        self.lm_head.decoder = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_routing: bool = False,
        return_dict: bool | None = None,
    ) -> MoAMaskedLMOutput | tuple[object, ...]:
        """Scores of the token at every place.

        Args:
            input_ids: [B, N].
            attention_mask: 0 at padding, [B, N].
            labels: the tokens behind the masks, [B, N], -100 everywhere else.
            num_items_in_batch: targets of the whole optimizer step, where the Trainer accumulates gradients.
            output_hidden_states: whether to return those of all layers.
            output_routing: whether to return the routing of every attention module.
            return_dict: False for a plain tuple.

        Raises:
            MixheadError: where ids do not fit the vocabulary.
        """
        encoded = self.model(input_ids, attention_mask, output_hidden_states=output_hidden_states)
        hidden_BNC = encoded.last_hidden_state
        assert hidden_BNC is not None
        scored = labels
        if labels is not None and self.training:
            # Six of seven tokens are no targets: to score them would be the most expensive part of a small model.
            targets_BN = labels != IGNORED
            hidden_BNC, scored = hidden_BNC[targets_BN].unsqueeze(0), labels[targets_BN].unsqueeze(0)
        logits_BNV = self.lm_head(hidden_BNC)
        auxiliary = auxiliary_loss(encoded.routing) if labels is not None or output_routing else None
        loss = None
        if labels is not None and scored is not None:
            loss = cross_entropy(logits_BNV, scored, 0.0, num_items_in_batch)
            if self.training:
                loss = with_auxiliary(loss, auxiliary, step_share(labels, num_items_in_batch))
        output = MoAMaskedLMOutput(
            loss=loss,
            logits=logits_BNV,
            auxiliary_loss=auxiliary,
            hidden_states=encoded.hidden_states,
            routing=encoded.routing if output_routing else None,
        )
        wants_output = self.config.return_dict if return_dict is None else return_dict
        return output if wants_output else output.to_tuple()


AutoModelForMaskedLM.register(MoAEncoderConfig, MoAForMaskedLM, exist_ok=True)
