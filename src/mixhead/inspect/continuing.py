"""A language model goes on with a text on standard output, and says how many heads it used."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from mixhead.models.hugging_face import MoHModelMixin
from mixhead.recording import RoutingLog, record_routing


@torch.inference_mode()
def write_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Tensor],
    new_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """Writes to standard output, token by token.

    Args:
        model: a causal language model.
        tokenizer: of the model.
        inputs: of `generate`: the prompt.
        new_tokens: at most so many.
        temperature: 0 always takes the likeliest token.
        seed: of the sampling.

    Returns:
        Which share of the heads was used, a sentence; "" of a model that was not converted.
    """
    torch.manual_seed(seed)
    sampling = {"do_sample": temperature > 0.0, "temperature": temperature or None, "top_p": None, "top_k": None}
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    with record_routing(model) as log:
        model.generate(**inputs, max_new_tokens=new_tokens, streamer=streamer, **sampling)
    return heads_used(model, log)


def heads_used(model: PreTrainedModel, log: RoutingLog) -> str:
    """Which share of the heads a token used, a sentence; "" of a model that was not converted."""
    if not isinstance(model, MoHModelMixin):
        return ""
    layers = model.config.moh["layers"]
    active, heads = (sum(layer[kind] for layer in layers) for kind in ("active_heads", "num_heads"))
    routed = [layer for layer in layers if layer["active_heads"] < layer["num_heads"]]
    part = sum(layer["active_heads"] for layer in routed) / max(1, sum(layer["num_heads"] for layer in routed))
    among = f" ({part:.1%} in the {len(routed)} that route)" if len(routed) < len(layers) else ""
    busiest = max((float(load.max()) for load in log.load().values()), default=1.0)
    return (
        f"{active} of {heads} heads per token ({active / heads:.1%}) over {len(layers)} layers{among}; "
        f"the busiest head served {busiest:.0%} of the tokens."
    )
