"""The MoA encoder-decoder for translation (arXiv 2210.05144), and with dense attention the Transformer beside it.

Shape legend: B batch, N tokens of the target, T tokens of the source, C hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.utils import ModelOutput

from mixhead.models.moa.configuration import MoATransformerConfig
from mixhead.models.moa.layers import DecoderLayer, Embeddings
from mixhead.models.moa.modeling import (
    IGNORED,
    MoAEncoder,
    MoAOutput,
    MoAPreTrainedModel,
    auxiliary_loss,
    check_ids,
    step_share,
    with_auxiliary,
)
from mixhead.routing import ExpertRouting


@dataclass
class MoASeq2SeqOutput(ModelOutput):
    """What the encoder-decoder returns.

    Attributes:
        loss: where labels were given: the cross entropy and, in training mode, the auxiliary loss.
        logits: [B, N, V].
        auxiliary_loss: sum of the routers' losses over all attention modules; None for a dense model.
        cache: keys and values, to go on from.
        decoder_hidden_states: with `output_hidden_states`.
        encoder_last_hidden_state: [B, T, C].
        encoder_hidden_states: with `output_hidden_states`.
        routing: with `output_routing`, the routing of every attention module: those of the encoder, then of each
            decoder layer its self- and its cross-attention.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    auxiliary_loss: Tensor | None = None
    cache: Cache | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    routing: tuple[ExpertRouting, ...] | None = None


class MoADecoder(MoAPreTrainedModel):
    """Embeddings and decoder layers."""

    def __init__(self, config: MoATransformerConfig, tokens: nn.Embedding) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config, tokens)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.decoder_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        input_ids: Tensor,
        encoded_BTC: Tensor,
        attention_mask: Tensor | None = None,
        encoded_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        query_mask_BN: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> MoAOutput:
        """Hidden states of the tokens that are new.

        Args:
            input_ids: [B, N].
            encoded_BTC: output of the encoder.
            attention_mask: 0 at padding among all tokens, those in the cache first.
            encoded_mask: 0 at padding of the source, [B, T].
            cache: is filled.
            query_mask_BN: bool, False at new tokens that do not count in the routing; by `attention_mask` if None.
            output_hidden_states: whether to return those of all layers.
        """
        key_mask_BN = None if attention_mask is None else attention_mask.bool()
        if query_mask_BN is None and key_mask_BN is not None:
            query_mask_BN = key_mask_BN[:, -input_ids.shape[1] :]
        source_mask_BT = None if encoded_mask is None else encoded_mask.bool()
        first = 0 if cache is None else cache.get_seq_length()
        hidden_BNC, states, routings = self.embeddings(input_ids, first), [], []
        for layer in self.layers:
            states.append(hidden_BNC)
            hidden_BNC, of_layer = layer(
                hidden_BNC,
                encoded_BTC,
                query_mask_BN,
                key_mask_BN,
                source_mask_BT,
                cache=cache,
            )
            routings += of_layer
        return MoAOutput(hidden_BNC, (*states, hidden_BNC) if output_hidden_states else None, tuple(routings))


class MoATransformer(MoAPreTrainedModel):
    """Encoder and decoder on one table of embeddings, without an output layer."""

    config_class = MoATransformerConfig

    def __init__(self, config: MoATransformerConfig) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.encoder = MoAEncoder(config, self.shared)
        self.decoder = MoADecoder(config, self.shared)
        self.post_init()

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "encoder.embeddings.tokens.weight": "shared.weight",
        "decoder.embeddings.tokens.weight": "shared.weight",
    }

    def get_input_embeddings(self) -> nn.Module:
        """The one table of embeddings."""
        return self.shared

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the table of encoder and decoder."""
        self.shared = self.encoder.embeddings.tokens = self.decoder.embeddings.tokens = value


class MoATransformerForConditionalGeneration(MoAPreTrainedModel, GenerationMixin):
    """The encoder-decoder with an output layer that shares the embeddings' weights."""

    config_class = MoATransformerConfig
    main_input_name = "input_ids"
    accepts_loss_kwargs = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "lm_head.weight": "model.shared.weight",
        "model.encoder.embeddings.tokens.weight": "model.shared.weight",
        "model.decoder.embeddings.tokens.weight": "model.shared.weight",
    }

    def __init__(self, config: MoATransformerConfig) -> None:
        super().__init__(config)
        self.model = MoATransformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self) -> MoAEncoder:
        """The part that `generate` runs once."""
        return self.model.encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: MoAOutput | tuple[Tensor, ...] | None = None,
        cache: EncoderDecoderCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        label_smoothing: float = 0.0,
        output_hidden_states: bool | None = None,
        output_routing: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoASeq2SeqOutput | tuple[Any, ...]:
        """Scores of the next token at every place of the target.

        Args:
            input_ids: the source, [B, T]; not needed where `encoder_outputs` are given.
            attention_mask: 0 at padding of the source, [B, T].
            decoder_input_ids: the target so far, [B, N]; made of `labels` where there are none.
            decoder_attention_mask: 0 at padding of the target, those tokens that the cache holds first.
            encoder_outputs: of an earlier call.
            cache: keys and values of earlier tokens.
            labels: the target, [B, N], -100 where there is nothing to predict.
            use_cache: whether to return a cache; not where labels are given.
            num_items_in_batch: targets of the whole optimizer step, where the Trainer accumulates gradients.
            label_smoothing: share of the target probability that is spread over the vocabulary.
            output_hidden_states: whether to return those of all layers.
            output_routing: whether to return the routing of every attention module.
            return_dict: False for a plain tuple.
            kwargs: what `generate` adds; not used.

        Raises:
            MixheadError: where ids do not fit the vocabulary.
        """
        del kwargs
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if encoder_outputs is None:
            encoder_outputs = self.model.encoder(input_ids, attention_mask, output_hidden_states=keep_states)
        elif not isinstance(encoder_outputs, MoAOutput):
            encoder_outputs = MoAOutput(encoder_outputs[0])
        assert isinstance(encoder_outputs, MoAOutput)
        encoded_BTC = encoder_outputs.last_hidden_state
        assert encoded_BTC is not None
        query_mask_BN = None
        if decoder_input_ids is None:
            assert labels is not None
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            query_mask_BN = labels != IGNORED
        check_ids("decoder_input_ids", decoder_input_ids, self.config.vocab_size)
        if cache is None and labels is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        decoded = self.model.decoder(
            decoder_input_ids,
            encoded_BTC,
            decoder_attention_mask,
            attention_mask,
            cache,
            query_mask_BN,
            output_hidden_states=keep_states,
        )
        logits_BNV = self.lm_head(decoded.last_hidden_state)
        routings = (*(encoder_outputs.routing or ()), *decoded.routing)
        auxiliary = auxiliary_loss(routings) if labels is not None or output_routing else None
        loss = None
        if labels is not None:
            loss = cross_entropy(logits_BNV, labels, label_smoothing, num_items_in_batch)
            if self.training:
                loss = with_auxiliary(loss, auxiliary, step_share(labels, num_items_in_batch))
        output = MoASeq2SeqOutput(
            loss=loss,
            logits=logits_BNV,
            auxiliary_loss=auxiliary,
            cache=cache,
            decoder_hidden_states=decoded.hidden_states,
            encoder_last_hidden_state=encoded_BTC,
            encoder_hidden_states=encoder_outputs.hidden_states,
            routing=routings if output_routing else None,
        )
        wants_output = self.config.return_dict if return_dict is None else return_dict
        return output if wants_output else output.to_tuple()

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The labels one place to the right, behind the start token; padding where they are ignored."""
        start_B1 = labels.new_full((labels.shape[0], 1), self.config.decoder_start_token_id)
        return torch.cat([start_B1, labels[:, :-1]], 1).masked_fill_(
            torch.cat([start_B1 == IGNORED, labels[:, :-1] == IGNORED], 1), self.config.pad_token_id
        )


def cross_entropy(
    logits_BNV: Tensor, labels_BN: Tensor, label_smoothing: float, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """Mean over the targets, in nats; over those of the whole optimizer step where their number is given."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(
        logits_BNV.flatten(0, 1).float(),
        labels_BN.flatten(),
        ignore_index=IGNORED,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss if num_items_in_batch is None else loss / num_items_in_batch


AutoModelForSeq2SeqLM.register(MoATransformerConfig, MoATransformerForConditionalGeneration, exist_ok=True)
