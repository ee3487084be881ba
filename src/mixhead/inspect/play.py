"""A page to play with a converted model: text with the heads that it uses, heads switched off, all heads beside it.

The page is Gradio's, served on this machine alone. Text is escaped before it becomes HTML.
"""

from __future__ import annotations

import html
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixhead.errors import MixheadError
from mixhead.inspect.steering import Steering, steered
from mixhead.inspect.writing import Written, stream
from mixhead.models.hugging_face import MoHModelMixin
from mixhead.recording.listen import routers_by_layer
from mixhead.recording.names import short_names

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#7f6fc9", "#777777")
STEPS = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
MOST_CHARACTERS, MOST_TOKENS = 8_000, 200  # of a prompt, and new ones
LOCAL = ("127.0.0.1", "localhost", "[::1]")  # by whatever port: it may be forwarded
CSS = """
.mixhead { line-height: 2.1; overflow-wrap: anywhere; white-space: pre-wrap; min-height: 8rem; font-size: 1rem; }
.mixhead .t { padding: .1em 0 .35em; border-radius: 3px; background-repeat: no-repeat; background-position: 1px 100%;
  background-size: calc(100% - 2px) 4px;
  background-color: color-mix(in srgb, var(--c, transparent) 28%, transparent); }
.mixhead .prompt { opacity: .8; }
.mixhead-legend { display: flex; flex-wrap: wrap; gap: .2rem .8rem; font-size: .85rem; margin-bottom: .4rem; }
.mixhead-legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
"""


@dataclass
class Player:
    """A model that is played with.

    Attributes:
        model: converted.
        tokenizer: of the model.
        layers: names of the layers that route.
        num_heads: of each of them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: list[str]
    num_heads: list[int]

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Player:
        """Raises MixheadError where no layer of the model routes."""
        routers = routers_by_layer(model)
        if not isinstance(model, MoHModelMixin) or not routers:
            raise MixheadError("This model routes in no layer: convert it first (mixhead convert).")
        counts = [int(router.num_heads) for router in routers.values()]  # type: ignore[arg-type]
        return cls(model.eval(), tokenizer, [*routers], counts)  # type: ignore[attr-defined]

    def write(
        self, prompt: str, new_tokens: int, active_heads: int, off: Mapping[str, Sequence[int]]
    ) -> Iterator[tuple[Written, Written, str]]:
        """Writes with the changes, then with all heads; yields both texts and how fast they came.

        Args:
            prompt: to continue.
            new_tokens: at most so many.
            active_heads: heads of every token in every layer; 0 as converted.
            off: heads that are switched off, by layer.

        Raises:
            MixheadError: where the prompt is too long for a page.
        """
        if len(prompt) > MOST_CHARACTERS:
            raise MixheadError(
                f"The prompt has {len(prompt):,} characters, of which a page would wait for long: give at most "
                f"{MOST_CHARACTERS:,}."
            )
        new_tokens = min(new_tokens, MOST_TOKENS)
        sparse, dense = Written(), Written()
        speeds: list[str] = []
        for name, steering in (
            ("chosen heads", Steering(active_heads or None, off)),
            ("all heads", Steering(max(self.num_heads))),
        ):
            start = time.perf_counter()
            with steered(self.model, steering):
                for written in stream(self.model, self.tokenizer, prompt, new_tokens):
                    sparse, dense = (written, dense) if name == "chosen heads" else (sparse, written)
                    count = len(written.texts) - written.prompt
                    speed = f"{name}: {count / (time.perf_counter() - start):.1f} tokens/s"
                    yield sparse, dense, "; ".join([*speeds, speed])
            speeds.append(speed)
        yield sparse, dense, "; ".join([*speeds, compared(sparse, dense)])


def compared(sparse: Written, dense: Written) -> str:
    """Where two texts part."""
    for place, (one, other) in enumerate(zip(sparse.texts, dense.texts, strict=False)):
        if one != other:
            return f"the texts part at new token {place - sparse.prompt + 1}"
    return "both wrote the same"


def tokens_html(written: Written, layer: str | None, num_heads: int) -> str:
    """The text as HTML: the colour of the rarest head of that layer that a token used, a strip of all heads beneath.

    Of equally rare heads it is the first, so that every token that used a head has a colour.
    """
    heads = written.heads.get(layer or "", [])
    uses = [sum(head in used for used in heads) for head in range(num_heads)]
    spans = []
    for place, text in enumerate(written.texts):
        style, note = "", ""
        if place < len(heads):
            rarest = min(heads[place], key=lambda h: uses[h], default=None)
            colour = "transparent" if rarest is None else head_colour(rarest, num_heads)
            style = f"--c:{colour};background-image:{strip(heads[place], num_heads)}"
            note = f"heads {', '.join(map(str, heads[place])) or 'none'} of {num_heads}"
        kind = "t prompt" if place < written.prompt else "t"
        shown = html.escape(text) if text else "·"
        spans.append(f'<span class="{kind}" style="{style}" title="{note}">{shown}</span>')
    return f'{legend_html(uses, heads)}<div class="mixhead" dir="auto">{"".join(spans)}</div>'


def legend_html(uses: Sequence[int], heads: Sequence[Sequence[int]]) -> str:
    """The colour of each head and the share of the tokens that used it; "" where no token used any yet.

    Args:
        uses: how many tokens used each head.
        heads: what each token used.
    """
    if not heads:
        return ""
    keys = [
        f'<span class="key"><i style="background:{head_colour(head, len(uses))}"></i>{head}: '
        f"{f'{count / len(heads):.0%}' if count else 'unused'}</span>"
        for head, count in enumerate(uses)
    ]
    alike = len({*map(tuple, heads)}) == 1 and len(heads) > 1
    note = "All tokens use the same heads in this layer, so the colour is that of the first for all." if alike else ""
    return f'<div class="mixhead-legend">{"".join(keys)}<span>{note}</span></div>'


def head_colour(head: int, num_heads: int) -> str:
    """One of nine colours that are told apart with any colour vision; of more heads a step of viridis."""
    if num_heads <= len(COLOURS):
        return COLOURS[head]
    place = head / (num_heads - 1) * (len(STEPS) - 1)
    low = min(int(place), len(STEPS) - 2)
    parts = [[int(STEPS[step][at : at + 2], 16) for at in (1, 3, 5)] for step in (low, low + 1)]
    return "#" + "".join(f"{round(a + (b - a) * (place - low)):02x}" for a, b in zip(*parts, strict=True))


def strip(used: Sequence[int], num_heads: int) -> str:
    """A CSS gradient with a bar for each head, full where it is used."""
    stops = []
    for head in range(num_heads):
        start, end = 100 * head / num_heads, 100 * (head + 0.8) / num_heads
        colour = "color-mix(in srgb, currentColor 65%, transparent)" if head in used else "transparent"
        stops += [f"transparent {start:.1f}%", f"{colour} {start:.1f}% {end:.1f}%", f"transparent {end:.1f}%"]
    return f"linear-gradient(to right,{','.join(stops)})"


def import_gradio() -> Any:
    """Gradio, told to send nothing anywhere.

    Raises:
        MixheadError: where it is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise MixheadError("The page needs Gradio: pip install 'mixhead[play]'.") from None
    return gradio


def page(player: Player, title: str) -> Any:
    """The page, a `gradio.Blocks`."""
    gr = import_gradio()
    short = short_names(player.layers)
    most = max(player.num_heads)

    def layer_of(name: str) -> str:
        return player.layers[short.index(name)]

    def run(
        prompt: str, new_tokens: int, active: int, everywhere: list[int], off: dict[str, list[int]], layer: str
    ) -> Any:
        merged = {name: sorted({*off.get(name, ()), *everywhere}) for name in player.layers}
        heads = player.num_heads[short.index(layer)]
        try:
            for sparse, dense, said in player.write(prompt, int(new_tokens), int(active), merged):
                yield tokens_html(sparse, layer_of(layer), heads), tokens_html(dense, None, 0), said, sparse
        except MixheadError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def show_layer(layer: str, off: dict[str, list[int]], written: Written | None) -> Any:
        name = layer_of(layer)
        heads = player.num_heads[short.index(layer)]
        choices = gr.CheckboxGroup(choices=[*range(heads)], value=off.get(name, []))
        return choices, "" if written is None else tokens_html(written, name, heads)

    def switch(layer: str, heads: list[int], off: dict[str, list[int]]) -> dict[str, list[int]]:
        return {**off, layer_of(layer): heads}

    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        off, written = gr.State({}), gr.State(None)
        gr.Markdown(
            f"# {html.escape(title)}\nA token takes the colour of the rarest head that it used in the chosen layer; "
            "the strip beneath shows all of them. The newest token has used none yet."
        )
        prompt = gr.Textbox(
            "The state of the Union is", label="Prompt", lines=2, max_length=MOST_CHARACTERS, elem_id="prompt"
        )
        with gr.Row():
            start = gr.Button("Write", variant="primary", elem_id="write")
            stop = gr.Button("Stop", elem_id="stop")
            new_tokens = gr.Slider(1, MOST_TOKENS, 40, step=1, label="New tokens", elem_id="new-tokens")
            active = gr.Slider(0, most, 0, step=1, label="Heads per token (0: as converted)", elem_id="active")
        with gr.Row():
            layer = gr.Dropdown(short, value=short[len(short) // 2], label="Layer", elem_id="layer")
            heads_off = gr.CheckboxGroup([*range(most)], label="Heads off in this layer", elem_id="off")
            everywhere = gr.CheckboxGroup([*range(most)], label="Heads off in every layer", elem_id="everywhere")
        said = gr.Markdown("", elem_id="said")
        with gr.Row():
            with gr.Column():
                gr.Markdown("### With the chosen heads")
                sparse = gr.HTML(elem_id="sparse")
            with gr.Column():
                gr.Markdown("### With all heads")
                dense = gr.HTML(elem_id="dense")
        inputs = [prompt, new_tokens, active, everywhere, off, layer]
        running = [
            event(run, inputs, [sparse, dense, said, written], concurrency_limit=1, concurrency_id="model")
            for event in (start.click, prompt.submit)
        ]
        stop.click(None, None, None, cancels=running)
        layer.change(show_layer, [layer, off, written], [heads_off, sparse])
        heads_off.input(switch, [layer, heads_off, off], off)
    return blocks


class OnlyItsOwnPage:
    """Refuses what another page asks for: under a name that was bound to this machine afterwards, or from its origin.

    Args:
        app: the ASGI application that answers all else.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or self.is_own(
            {name: value.decode("latin-1") for name, value in scope["headers"]}
        ):
            await self.app(scope, receive, send)
            return
        from starlette.responses import PlainTextResponse

        answer = "This page answers itself alone: open it as http://127.0.0.1 or http://localhost."
        await PlainTextResponse(answer, status_code=403)(scope, receive, send)

    @staticmethod
    def is_own(headers: Mapping[bytes, str]) -> bool:
        """Whether a request is for this machine, and no other page's."""
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        return re.sub(r":\d+$", "", host) in LOCAL and origin in (None, f"http://{host}")


def serve(player: Player, title: str, port: int | None) -> Any:
    """Serves the page on this machine alone, and returns at once.

    Args:
        player: the model.
        title: heading.
        port: a free one by default.

    Returns:
        The running page: its address is `local_url`, `block_thread()` waits until Ctrl-C, `close()` ends it.
    """
    gr = import_gradio()
    blocks = page(player, title)
    # Only fonts of the system: a named web font would be loaded from the network.
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    blocks.queue().launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        theme=theme,
        css=CSS,
        footer_links=[],
        app_kwargs={"middleware": [(OnlyItsOwnPage, (), {})]},
        prevent_thread_lock=True,
    )
    return blocks
