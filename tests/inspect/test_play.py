"""The page to play with a model, in a real browser."""

import re

import pytest
from transformers import LlamaForCausalLM

from mixhead import MixheadError
from mixhead.inspect.play import COLOURS, Player, head_colour, serve, tokens_html
from mixhead.inspect.writing import Written, stream


@pytest.fixture(scope="module")
def player(talking_llama):
    return Player.of(*talking_llama)


def test_every_token_comes_with_its_heads(player):
    steps = [len(w.texts) for w in stream(player.model, player.tokenizer, "the state", 6)]
    *_, last = stream(player.model, player.tokenizer, "the state", 6)
    assert steps == [*range(last.prompt, last.prompt + 7)]
    assert "".join(last.texts[: last.prompt]).strip() == "the state"
    for layer in player.layers:
        assert len(last.heads[layer]) == len(last.texts) - 1
        assert all(len(used) == 2 and used[0] == 0 for used in last.heads[layer])


def test_a_reader_who_leaves_stops_the_model(player):
    text = stream(player.model, player.tokenizer, "the", 10_000)
    next(text)
    text.close()


def test_an_error_of_the_model_reaches_the_reader(player, monkeypatch):
    monkeypatch.setattr(player.model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        [*stream(player.model, player.tokenizer, "the", 3)]
    with pytest.raises(MixheadError, match="holds no token"):
        [*stream(player.model, player.tokenizer, "", 3)]


def test_text_is_escaped():
    written = Written(["<script>", '"', ""], prompt=1, heads={"a": [[0], [1]]})
    page = tokens_html(written, "a", 2)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count('<span class="t') == 3


def colours_of(page):
    return re.findall(r'<span class="t[^"]*" style="--c:([^;]+);', page)


def test_every_token_that_used_a_head_has_a_colour_and_the_legend_says_which():
    """Also where so many heads are off that all tokens use the same ones, and none of them is rare."""
    written = Written(["a", "b", "c", "d"], prompt=1, heads={"x": [[0, 1], [0, 2], [0, 1]], "y": [[1, 2]] * 3})
    page = tokens_html(written, "x", 4)
    assert colours_of(page) == [COLOURS[1], COLOURS[2], COLOURS[1]]
    legend = re.findall(r'<i style="background:(#\w+)"></i>([^<]+)<', page)
    assert legend == [*zip(COLOURS, ["0: 100%", "1: 67%", "2: 33%", "3: unused"], strict=False)]
    assert "All tokens use the same heads" not in page
    alike = tokens_html(written, "y", 4)
    assert colours_of(alike) == [COLOURS[1]] * 3
    assert "All tokens use the same heads in this layer" in alike
    assert "mixhead-legend" not in tokens_html(written, None, 0)


def test_heads_have_different_colours_however_many_there_are():
    for heads in (2, 9, 10, 32):
        colours = [head_colour(head, heads) for head in range(heads)]
        assert len({*colours}) == heads
        assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)


def test_a_dense_model_is_refused(player):
    with pytest.raises(MixheadError, match="routes in no layer"):
        Player.of(
            LlamaForCausalLM(
                player.model.config.base_config_class(
                    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
                )
            ),
            None,
        )


def test_a_prompt_that_would_block_the_page_is_refused(player, monkeypatch):
    with pytest.raises(MixheadError, match=r"200,000 characters.*give at most 8,000"):
        next(player.write("x" * 200_000, 1, 0, {}))
    asked = []

    def stream(model, tokenizer, prompt, new_tokens):
        asked.append(new_tokens)
        return [Written(["the"], 1)]

    monkeypatch.setattr("mixhead.inspect.play.stream", stream)
    [*player.write("the", 10**6, 0, {})]
    assert asked == [200, 200]


def test_other_pages_are_not_answered(player):
    pytest.importorskip("gradio", reason="Gradio is not installed")
    import httpx

    blocks = serve(player, "Heads", None)
    try:
        own = blocks.local_url.rstrip("/")
        host = own.removeprefix("http://")
        call = f"{own}/gradio_api/call/run"
        asked = {"data": ["the", 1, 0, [], {}, "0"]}
        for headers in ({"Host": "rebound.example"}, {"Host": f"rebound.example:{blocks.server_port}"}, {"Host": ""}):
            assert httpx.get(own, headers=headers).status_code == 403
            assert httpx.post(call, json=asked, headers=headers).status_code == 403
        for origin in ("https://foreign.example", f"https://{host}", "http://localhost:1", "null"):
            answer = httpx.post(call, json=asked, headers={"Origin": origin})
            assert answer.status_code == 403 and "answers itself alone" in answer.text
        assert httpx.get(own).status_code == 200
        forwarded = {"Host": "localhost:8123", "Origin": "http://localhost:8123"}
        assert httpx.get(own, headers=forwarded).status_code == 200
        assert httpx.post(call, json=asked, headers={"Origin": own}).status_code == 200
    finally:
        blocks.close()


def test_a_reader_writes_switches_heads_off_and_changes_their_number(player, browser):
    pytest.importorskip("gradio", reason="Gradio is not installed")
    blocks = serve(player, "Heads of <tiny>", None)
    try:
        assert blocks.local_url.startswith("http://127.0.0.1:")
        foreign, page = [], browser.new_page(viewport={"width": 1200, "height": 1000})
        page.on(
            "request",
            lambda r: None if r.url.startswith((blocks.local_url, "data:", "blob:")) else foreign.append(r.url),
        )
        page.goto(blocks.local_url)
        page.locator("#new-tokens input[type=number]").fill("6")
        page.locator("#prompt textarea").fill("the <b>state</b>")
        page.locator("#write").click()
        page.locator("#said", has_text=re.compile("the texts part|both wrote")).wait_for()
        assert page.locator("#sparse b").count() == 0
        tokens = page.locator("#sparse .t").count()
        assert tokens == page.locator("#dense .t").count() > 6
        assert page.locator("#sparse .t").nth(1).get_attribute("title").startswith("heads 0, ")
        page.locator("#everywhere label", has_text="0").click()
        page.locator("#active input[type=number]").fill("3")
        page.locator("#write").click()
        page.locator('#sparse .t[title="heads 1, 2, 3 of 4"]').nth(tokens - 2).wait_for()
        assert page.locator("#sparse .key").all_inner_texts() == ["0: unused", "1: 100%", "2: 100%", "3: 100%"]
        painted = "all => all.map(e => getComputedStyle(e).backgroundColor)"
        assert len({*page.locator('#sparse .t[title]:not([title=""])').evaluate_all(painted)}) == 1
        assert "rgba(0, 0, 0, 0)" not in page.locator('#sparse .t[title]:not([title=""])').evaluate_all(painted)
        page.locator("#said", has_text=re.compile("the texts part|both wrote")).wait_for()
        assert foreign == []
    finally:
        blocks.close()
