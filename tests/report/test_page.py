"""The page in a real browser: what a reader clicks, and what the page then shows."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from recordings import HOSTILE, picture_recording, text_recording

from mixhead import Recording, record_routing
from mixhead.report.contents import read_contents
from mixhead.report.html import write_html
from mixhead.report.statistics import difference, false_discovery

CONTRAST = (Path(__file__).parent / "contrast.js").read_text()
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc000000301010018dd8db0"
    "0000000049454e44ae426082"
)


def write(tmp_path, recording, **options):
    return write_html(read_contents(recording), tmp_path / "heads.html", **options)


@pytest.fixture
def texts(tmp_path):
    return write(tmp_path, text_recording(tmp_path / "run"), title="<b>Heads & tails</b>")


def test_hostile_tokens_are_shown_as_text(texts, open_page):
    page = open_page(texts)
    assert page.title() == page.locator("h1").inner_text() == "<b>Heads & tails</b>"
    assert page.locator("main img").count() == 0
    shown = page.locator("#flow .t").all_text_contents()
    assert {HOSTILE[0], HOSTILE[1], "&amp;", " مرحبا", "👩\u200d👩\u200d👧", "x" * 300, "{{data}}", "<!--"} <= {*shown}
    assert "text <0>" in page.locator("#first option").all_text_contents()


def test_a_token_shows_its_heads_by_mouse_by_touch_and_by_keys(tmp_path, open_page):
    recording = text_recording(tmp_path / "run", texts=1)
    page = open_page(write(tmp_path, recording))
    layer = int(page.locator("#layer-name").inner_text())
    selected_TH = recording.selected(recording.layers[layer])

    def says(token):
        used = ", ".join(str(head) for head in selected_TH[token].nonzero()[0])
        return f"In layer {layer} it uses heads {used} of 4."

    page.locator("#flow .t").nth(7).hover()
    assert says(7) in page.locator("#detail").inner_text()
    page.locator("#flow .t").nth(9).click()
    assert says(9) in page.locator("#detail").inner_text()
    page.locator("#flow .flow").focus()
    page.keyboard.press("ArrowRight")
    assert says(10) in page.locator("#spoken").inner_text()
    assert page.locator('#flow .t[aria-selected="true"]').count() == 1
    page.keyboard.press("Home")
    assert says(0) in page.locator("#detail").inner_text()


def test_a_head_lights_up_exactly_its_tokens(tmp_path, open_page):
    recording = text_recording(tmp_path / "run", texts=1, weighted=True)
    page = open_page(write(tmp_path, recording))
    cells = page.locator("#map td:not(.even)")
    cells.nth(2 * 3 + 1).click()  # head 2 of layer 1: heads are rows, layers columns
    assert page.locator("#layer-name").inner_text() == "1"
    lit = page.locator("#flow .t").evaluate_all("all => all.map(e => /\\blit/.test(e.className))")
    assert lit == recording.selected(recording.layers[1])[:, 2].tolist()
    assert page.locator('#heads button[aria-pressed="true"]').inner_text() == "2"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    assert page.locator('#heads button[aria-pressed="true"]').inner_text() == "1"
    page.keyboard.press("Escape")
    assert page.locator('#heads button[aria-pressed="true"]').count() == 0
    page.keyboard.press("]")
    page.keyboard.press("0")
    assert page.locator("#layer-name").inner_text() == "2"
    assert "head 0 in layer 2" in page.locator("#token-hint").inner_text()


def test_loads_on_the_map_are_those_of_the_recording(tmp_path, open_page):
    recording = text_recording(tmp_path / "run")
    page = open_page(write(tmp_path, recording))
    shown = [int(text) for text in page.locator("#map td:not(.even)").all_text_contents()]
    loads = [recording.selected(name).mean(0) for name in recording.layers]
    assert shown == [int(100 * round(float(load[head]), 4) + 0.5) for head in range(4) for load in loads]
    assert "shared by all" in page.locator("#map td").nth(0).get_attribute("aria-label")


def test_two_texts_side_by_side(texts, open_page):
    page = open_page(texts)
    assert page.locator("#first option:checked").inner_text() == "text <0>"
    page.locator("#compare").scroll_into_view_if_needed()
    page.locator("#sides .flow").nth(1).wait_for()
    assert page.locator("#sides h3").all_inner_texts() == ["Text 1 (text <0>)", "Text 2 (text <1>)"]
    page.select_option("#first", label="Text 1 (text <0>)")
    page.select_option("#second", label="Text 2 (text <1>)")
    assert page.locator("#sides .flow").count() == 2
    assert "The largest difference: head" in page.locator("#verdict").inner_text()
    page.locator("#difference td").nth(1).click()
    assert page.locator("#sides .t.lit").count() > 0


def test_two_classes_side_by_side(tmp_path, open_page):
    recording = picture_recording(tmp_path / "run", steps=(900, 100))
    page = open_page(write(tmp_path, recording, pictures=[PNG, PNG]))
    page.select_option("#first", label="bag")
    page.select_option("#second", label="boat")
    page.locator("#compare").scroll_into_view_if_needed()
    page.locator("#sides figure").nth(1).wait_for()
    assert [text.split(",")[0] for text in page.locator("#sides figcaption").all_inner_texts()] == [
        "Picture 2 (bag)", "Picture 1 (boat)",
    ]  # fmt: skip


def test_what_python_and_the_page_call_significant_agrees(tmp_path, open_page):
    contents = read_contents(text_recording(tmp_path / "run", tokens=900))
    page = open_page(write_html(contents, tmp_path / "heads.html"))
    first, second = contents.groups_by("text")
    p_LH = np.stack([difference(first.loads[n], second.loads[n]).p_H for n in contents.recording.layers])
    sure_LH = false_discovery(p_LH.ravel()).reshape(p_LH.shape) < 0.05
    shown = page.locator("#difference td").evaluate_all("all => all.map(e => e.classList.contains('sure'))")
    assert shown == sure_LH.T.ravel().tolist()
    assert 0 < sum(shown) < len(shown)
    verdict = page.locator("#verdict").inner_text()
    assert f"{sum(shown)} of 12 heads differ significantly (15 and 15 blocks of up to 64 tokens)." in verdict


def test_too_few_blocks_are_refused_a_test_in_a_sentence(tmp_path, open_page):
    page = open_page(write(tmp_path, text_recording(tmp_path / "run", tokens=400)))
    assert (
        page.locator("#verdict")
        .inner_text()
        .startswith(
            "No test: there are 7 and 7 blocks of up to 64 tokens, and it takes 10 of each to tell a difference from "
            "chance. The largest difference: head"
        )
    )
    assert page.locator("#difference td.sure").count() == 0


def test_the_number_of_observations_stands_beside_loads(tmp_path, open_page):
    page = open_page(write(tmp_path, text_recording(tmp_path / "run", tokens=400)))
    assert "800 tokens (14 blocks of up to 64 tokens)" in page.locator("#subtitle").inner_text()
    page.select_option("#label", "text")
    assert "text <0> (400 tokens, 7 blocks)" in page.locator("#chart .legend").inner_text()


def test_a_picture_is_one_observation_whatever_its_patches_and_time_steps(tmp_path, open_page):
    recording = picture_recording(tmp_path / "run", steps=(900, 500, 100), sizes=((16, 16), (8, 8)))
    page = open_page(write(tmp_path, recording, pictures=[PNG, PNG]))
    assert "(2 pictures)" in page.locator("#subtitle").inner_text()
    page.select_option("#first", label="bag")
    page.select_option("#second", label="boat")
    assert page.locator("#verdict").inner_text().startswith("No test: there are 1 and 1 pictures")


def test_loads_by_group_and_words(texts, open_page):
    page = open_page(texts)
    page.select_option("#label", "word class")
    assert "punctuation" in page.locator("#chart .legend").inner_text()
    page.locator("#chart summary").click()
    assert page.locator("#chart tbody tr").count() >= 3
    assert page.locator("#word-list dt").all_inner_texts() == [f"head {head}" for head in range(4)]


def test_heads_and_layers_that_go_together(tmp_path, open_page):
    contents = read_contents(text_recording(tmp_path / "run"))
    page = open_page(write_html(contents, tmp_path / "heads.html"))
    page.locator("#layer").fill("1")
    first = contents.recording.layers[1]
    shown = page.locator("#pairs tbody tr").nth(1).locator("td").nth(2).inner_text()
    assert int(shown.replace("−", "-")) == round(100 * float(contents.together[first][1, 2]))
    alike = contents.agreement[contents.recording.layers[0], contents.recording.layers[2]]
    assert page.locator("#alike tbody tr").nth(2).locator("td").nth(0).inner_text() == str(round(100 * alike))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_axe_finds_nothing_and_nothing_is_wider_than_the_screen(texts, open_page, violations, scheme, width):
    page = open_page(texts, width=width, scheme=scheme)
    page.locator("#heads button").nth(2).click()
    page.locator("#flow .t").nth(3).click()
    assert page.evaluate(CONTRAST) == []
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.keyboard.press("Escape")
    assert page.evaluate(CONTRAST) == []
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == ("light" if scheme == "dark" else "dark")
    assert page.evaluate(CONTRAST) == []


def test_pictures_have_an_overlay_for_every_layer_and_time_step(tmp_path, open_page, violations):
    recording = picture_recording(tmp_path / "run", steps=(900, 500, 100))
    page = open_page(write(tmp_path, recording, pictures=[PNG, PNG]))
    assert violations(page) == []
    assert page.locator("#flow figure img").count() == 2
    page.locator("#layer").fill("0")
    assert page.locator("figcaption").all_inner_texts() == [
        "Picture 1 (boat), 4 × 6 patches",
        "Picture 2 (bag), 4 × 6 patches",
    ]
    assert page.locator("#time-name").inner_text() == "900"
    used = []
    for step in range(3):
        page.locator("#time").fill(str(step))
        page.locator("#flow .frame").nth(1).focus()
        page.keyboard.press("ArrowDown")  # row 2, then 3, then 4; column 1
        used.append(page.locator("#detail").inner_text())
    tokens, selected_TH = recording.tokens("stages.0.attn"), recording.selected("stages.0.attn")
    for step, text in enumerate(used):
        of = (tokens.call == step) & (tokens.row == 1) & (tokens.labels["y"] == step + 1) & (tokens.labels["x"] == 0)
        heads = [str(head) for head in selected_TH[of][0].nonzero()[0]]
        assert f"row {step + 2}, column 1" in text
        assert f"{', '.join(heads) or 'none'} of 2" in text
    page.locator("#layer").fill("1")
    assert page.locator("figcaption").nth(0).inner_text() == "Picture 1 (boat), 2 × 3 patches"


def test_an_encoder_and_a_decoder_beside_each_other(tmp_path, open_page):
    from mixhead.models.moa import MoATransformerConfig, MoATransformerForConditionalGeneration

    config = MoATransformerConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_heads=4, head_dim=4, active_heads=2,
        encoder_layers=1, decoder_layers=1,
    )  # fmt: skip
    model = MoATransformerForConditionalGeneration(config).eval()
    with record_routing(model, tmp_path / "run") as log:
        log.names["token"] = {number: f" word{number}" for number in range(20)}
        model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=6, min_new_tokens=6, num_beams=1)
    page = open_page(write(tmp_path, Recording(tmp_path / "run")))
    assert page.locator("#flow .flow").count() == 2
    assert page.locator("#flow .flow").nth(0).inner_text() == " word5 word6 word7 word8"
    assert page.locator("#flow h3").all_inner_texts() == ["Source 1", "Written 1"]
    painted = "flow => [...flow.querySelectorAll('.t')].filter(t => /\\bb\\d/.test(t.className)).length"
    for layer in range(3):
        page.locator("#layer").fill(str(layer))
        counts = [page.locator("#flow .flow").nth(flow).evaluate(painted) for flow in range(2)]
        assert counts == ([4, 0] if "encoder" in page.locator("#layer-name").inner_text() else [0, 6])


@pytest.mark.parametrize("sizes", [{"tokens": 0}, {"tokens": 1}, {"heads": 1, "active": 1, "shared": 0}, {"layers": 1}])
def test_the_smallest_recordings(tmp_path, open_page, sizes):
    page = open_page(write(tmp_path, text_recording(tmp_path / "run", **{"texts": 1, **sizes})))
    assert page.locator("#map td:not(.even)").count() == sizes.get("heads", 4) * sizes.get("layers", 3)
    assert page.locator("#flow .t").count() == sizes.get("tokens", 40)
    assert page.evaluate(CONTRAST) == []


def test_ten_thousand_tokens_open_within_three_seconds(tmp_path, open_page):
    recording = text_recording(
        tmp_path / "run", texts=4, tokens=2500, layers=30, heads=9, active=7, words=[" the", " state", " of", " union"]
    )
    file = write(tmp_path, recording)
    took = []
    while not took or (min(took) > 3 and len(took) < 4):  # again, where another process had the machine
        start = time.perf_counter()
        page = open_page(file)
        page.locator("#word-list dt").first.wait_for()
        took.append(time.perf_counter() - start)
    assert min(took) < 3
    assert page.locator("#flow .t").count() == 10_000


def test_two_thousand_tokens_of_thirty_layers_take_less_than_five_megabytes(tmp_path):
    recording = text_recording(tmp_path / "run", tokens=1000, layers=30, heads=9, active=7, weighted=True)
    assert write(tmp_path, recording).stat().st_size < 5_000_000


def test_it_prints(texts, open_page):
    page = open_page(texts)
    page.emulate_media(media="print")
    assert not page.locator("#theme").is_visible()
    assert page.locator("#first").is_visible()
    assert page.pdf().startswith(b"%PDF")
