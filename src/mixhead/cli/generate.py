"""`mixhead generate`: text from a model, and how many heads it used for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixhead.cli.common import MODEL_HELP, console, model_folder
from mixhead.errors import MixheadError

PROMPT = "The state of the Union is"
NEW_TOKENS = 80


def generate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    prompt: Annotated[str | None, typer.Option(help=f"The text to continue; by default {PROMPT!r}.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 text file to continue instead.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"How many tokens to write, at most; by default {NEW_TOKENS}, or what there is room for."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling (with a temperature above 0).")] = 0,
) -> None:
    """Continues a text with a dense or converted model and prints the share of heads that it used."""
    import torch
    from transformers import TextStreamer

    from mixhead import store
    from mixhead.data.text import read_text_file
    from mixhead.data.windows import prompt_ids
    from mixhead.models.hugging_face import MoHModelMixin
    from mixhead.recording import record_routing

    if prompt is not None and prompt_file is not None:
        raise MixheadError("Give one of a prompt (--prompt) and a file that holds one (--prompt-file).")
    text = read_text_file(prompt_file) if prompt_file is not None else PROMPT if prompt is None else prompt
    network, tokenizer = store.load_causal_lm(model_folder(model))
    inputs, new_tokens = prompt_ids(network, tokenizer, text, max_new_tokens, NEW_TOKENS)
    torch.manual_seed(seed)
    sampling = {"do_sample": temperature > 0.0, "temperature": temperature or None, "top_p": None, "top_k": None}
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    with record_routing(network) as log, torch.inference_mode():
        network.generate(**inputs, max_new_tokens=new_tokens, streamer=streamer, **sampling)
    if isinstance(network, MoHModelMixin):
        used = network.config.moh["layers"]
        active, heads = (sum(layer[kind] for layer in used) for kind in ("active_heads", "num_heads"))
        routed = [layer for layer in used if layer["active_heads"] < layer["num_heads"]]
        part = sum(layer["active_heads"] for layer in routed) / max(1, sum(layer["num_heads"] for layer in routed))
        among = f" ({part:.1%} in the {len(routed)} that route)" if len(routed) < len(used) else ""
        busiest = max((float(load.max()) for load in log.load().values()), default=1.0)
        console.print(
            f"\n{active} of {heads} heads per token ({active / heads:.1%}) over {len(used)} layers{among}; "
            f"the busiest head served {busiest:.0%} of the tokens.",
            style="dim",
        )
