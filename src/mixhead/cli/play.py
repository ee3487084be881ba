"""`mixhead play`: a local page where a model writes and shows which heads it uses."""

from __future__ import annotations

from typing import Annotated

import typer

from mixhead.cli.common import MODEL_HELP, console, model_folder


def play(
    model: Annotated[str, typer.Argument(help="A converted model. " + MODEL_HELP)],
    port: Annotated[int | None, typer.Option(help="Port of this machine; a free one by default.")] = None,
) -> None:
    """Opens a page on this machine: type a prompt, see the heads of each token, switch heads off, compare with all."""
    from mixhead import store
    from mixhead.inspect.play import Player, import_gradio, serve

    import_gradio()
    network, tokenizer = store.load_causal_lm(model_folder(model))
    player = Player.of(network, tokenizer)
    page = serve(player, f"Heads of {model_folder(model).name}", port)
    console.print(f"Open {page.local_url} in a browser of this machine; Ctrl-C ends it.", highlight=False)
    page.block_thread()
